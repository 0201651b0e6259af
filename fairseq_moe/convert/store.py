"""Our checkpoint as a converter sees it: the model's tensors and flags, without a trainer.

What all directions of conversion share of the checkpoint format.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fairseq.dataclass.configs import FairseqConfig
from fairseq.tasks.language_modeling import LanguageModelingConfig
from omegaconf import OmegaConf
from torch import Tensor

from fairseq_moe.checkpoint import (
    Checkpoint,
    LazyTensor,
    ModelShape,
    ShardContent,
    damage_as_sentence,
    has_expert_rows,
    split_content,
    split_key,
    write_checkpoint,
)
from fairseq_moe.convert.hf.file import StoredTensor, read_header, read_tensor
from fairseq_moe.convert.spec import ModelSpec
from fairseq_moe.convert.spec_flags import flags_of, spec_of
from fairseq_moe.errors import CheckpointError
from fairseq_moe.models.moe_transformer_lm import MoETransformerLanguageModelConfig

__all__ = [
    "CHECKPOINT",
    "COMPANIONS",
    "CONVERSION",
    "Assembled",
    "StoredModel",
    "complete_settings",
    "fresh_state",
    "write_model",
    "write_tensors",
]

CHECKPOINT = "checkpoint.pt"
COMPANIONS = "hf"
CONVERSION = "conversion.json"
_EMBEDDING = "decoder.embed_tokens.weight"


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """One of our tensors, made when it is written.

    Args:
        name: of the parameter.
        shape: whole, with all E experts.
        dtype: of its elements.
        load: makes it; for an expert tensor the rows of these experts, in order.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[Sequence[int] | None], Tensor]

    def lazily(self, expert_ids: Sequence[int]) -> LazyTensor:
        """Make the part of the tensor that a shard with these experts holds, unread."""
        if not has_expert_rows(self.name):
            return LazyTensor(dtype=self.dtype, shape=self.shape, load=lambda: self.load(None))
        shape = (len(expert_ids), *self.shape[1:])
        return LazyTensor(dtype=self.dtype, shape=shape, load=lambda: self.load(expert_ids))


def write_model(directory: Path, *, spec: ModelSpec, tensors: Sequence[Assembled], num_shards: int) -> None:
    """Write a converted checkpoint, which no training has touched.

    Args:
        directory: of the main file, ``checkpoint.pt``.
        spec: what the model is.
        tensors: of the model.
        num_shards: over which the experts are spread evenly.
    """
    write_tensors(
        directory,
        state=_main_state(spec),
        shape=ModelShape(
            num_experts=spec.routing.num_experts,
            top_k=spec.routing.top_k,
            model_dim=spec.model_dim,
            expert_dim=spec.expert_ffn_dim,
            num_layers=spec.num_layers,
        ),
        tensors=tensors,
        aliases={"decoder.output_projection.weight": _EMBEDDING} if spec.tied else {},
        num_shards=num_shards,
    )


def write_tensors(
    directory: Path,
    *,
    state: dict[str, Any],
    shape: ModelShape,
    tensors: Sequence[Assembled],
    aliases: dict[str, str],
    num_shards: int,
) -> None:
    """Write tensors as the shards and main file of a checkpoint.

    Args:
        directory: of the main file, ``checkpoint.pt``.
        state: what the main file says besides.
        shape: sizes of the model.
        tensors: of the model.
        aliases: further names of some of them.
        num_shards: over which the experts are spread evenly.
    """

    def content_of(expert_ids: Sequence[int]) -> ShardContent:
        model = {tensor.name: tensor.lazily(expert_ids) for tensor in tensors}
        return ShardContent(expert_ids=list(expert_ids), model=dict(model), aliases=aliases)

    write_checkpoint(
        directory / CHECKPOINT,
        state=state,
        run_id=None,
        update=0,
        shape=shape,
        contents=split_content(content_of, num_experts=shape.num_experts, num_shards=num_shards),
        num_shards=num_shards,
    )


def _main_state(spec: ModelSpec) -> dict[str, Any]:
    return fresh_state(complete_settings(flags_of(spec), max_positions=spec.max_positions))


def fresh_state(cfg: dict[str, Any]) -> dict[str, Any]:
    """Make what stock fairseq expects of a checkpoint besides the weights, before any training."""
    return {
        "args": None,
        "cfg": cfg,
        "criterion": {},
        "optimizer_history": [
            {
                "criterion_name": "MoECrossEntropyCriterion",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {},
                "num_updates": 0,
            }
        ],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}, "val_loss": None},
        "last_optimizer_state": None,
    }


@dataclass(kw_only=True)
class StoredModel:
    """A checkpoint to be read.

    Args:
        path: of its main file.
        spec: what the model is.
        restored_from: what the training began with, if it began with a checkpoint.
    """

    path: Path
    spec: ModelSpec
    restored_from: Path | None
    _parts: dict[str, list["_Part"]]

    @classmethod
    def open(cls, path: Path) -> "StoredModel":
        """Read the main file (of a directory: ``checkpoint.pt`` in it) and verify all shards.

        Raises:
            CheckpointError: it is damaged, or no checkpoint of ours.
            ConfigError: no family has this model.
        """
        path = path / CHECKPOINT if path.is_dir() else path
        checkpoint = Checkpoint.open(path)
        checkpoint.verify()
        # Not through the checkpoint's reader: it maps files, so that a pass over all fills the memory it can get.
        parts: dict[str, list[_Part]] = {}
        for entry in checkpoint.manifest.shards:
            for key, stored in read_header(path.parent / entry.file).items():
                name, state = split_key(key)
                if state is None:
                    parts.setdefault(name, []).append(_Part(entry.expert_ids, stored))
        if _EMBEDDING not in parts:
            raise CheckpointError(
                f"{path} has no {_EMBEDDING}, which every model has; give the checkpoint of a whole model."
            )
        with damage_as_sentence(path):
            cfg = checkpoint.state.get("cfg") or {}
            spec = _spec(path, cfg.get("model") or {}, vocab_size=parts[_EMBEDDING][0].stored.shape[0])
            settings = cfg.get("checkpoint") or {}
            begun = settings.get("finetune_from_model") or settings.get("restore_file")
            restored_from = Path(begun) if begun and begun != "checkpoint_last.pt" else None
        return cls(path=path, spec=spec, restored_from=restored_from, _parts=parts)

    def names(self) -> list[str]:
        """List the names of all parameters and buffers, tied ones once."""
        return sorted(self._parts)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return self._parts[name][0].stored.dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor, with all E experts."""
        shape = self._parts[name][0].stored.shape
        if has_expert_rows(name):
            return (sum(len(part.expert_ids) for part in self._parts[name]), *shape[1:])
        return shape

    def tensor(self, name: str) -> Tensor:
        """Read a whole tensor, with all E experts."""
        if not has_expert_rows(name):
            return read_tensor(self._parts[name][0].stored)
        whole = torch.empty(self.shape(name), dtype=self.dtype(name))
        for part in self._parts[name]:
            whole[part.expert_ids] = read_tensor(part.stored)
        return whole

    def file_of(self, name: str, expert: int | None) -> Path:
        """The shard that holds the tensor, or the row of one expert."""
        parts = self._parts[name]
        return next(part for part in parts if expert is None or expert in part.expert_ids).stored.path

    def row(self, name: str, expert: int) -> Tensor:
        """The row of one expert."""
        part = next(part for part in self._parts[name] if expert in part.expert_ids)
        index = part.expert_ids.index(expert)
        return read_tensor(part.stored.rows(index, index + 1))[0]


def _spec(path: Path, flags: dict[str, Any], *, vocab_size: int) -> ModelSpec:
    positions = flags.get("max_target_positions") or flags.get("tokens_per_sample")
    if not positions:
        raise CheckpointError(f"{path} does not say how long sequences may be (--max-target-positions).")
    return spec_of(flags, vocab_size=vocab_size, max_positions=int(positions))


class _Part(NamedTuple):
    """Hold the part of a tensor that goes into one shard."""

    expert_ids: list[int]
    stored: StoredTensor


def complete_settings(flags: dict[str, Any], *, max_positions: int) -> dict[str, Any]:
    """Make the complete configuration that fairseq keeps in a checkpoint, for a model that no training has made.

    Args:
        flags: of the model.
        max_positions: longest sequence.
    """
    cfg = OmegaConf.structured(FairseqConfig)
    OmegaConf.set_struct(cfg, False)
    cfg.task = OmegaConf.structured(
        LanguageModelingConfig(tokens_per_sample=max_positions, max_target_positions=max_positions)
    )
    cfg.model = OmegaConf.structured(MoETransformerLanguageModelConfig(**flags))
    cfg.task._name, cfg.model._name = "language_modeling", "transformer_lm"
    found: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)  # type: ignore[assignment]
    return found
