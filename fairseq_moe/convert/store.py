"""Our checkpoint as a converter sees it: the model's tensors and flags, without a trainer.

The one module of this package that knows the checkpoint format.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_moe.checkpoint import (
    Checkpoint,
    LazyTensor,
    ModelShape,
    ShardContent,
    has_expert_rows,
    key_of,
    share_of,
    write_checkpoint,
)
from fairseq_moe.convert.flags import flags_of, spec_of
from fairseq_moe.convert.settings import complete_settings
from fairseq_moe.convert.spec import ModelSpec
from fairseq_moe.errors import CheckpointError

__all__ = ["CHECKPOINT", "COMPANIONS", "CONVERSION", "Assembled", "StoredModel", "write_model"]

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
        """What a shard with these experts holds of it."""
        if not has_expert_rows(self.name):
            return LazyTensor(dtype=self.dtype, shape=self.shape, load=lambda: self.load(None))
        shape = (len(expert_ids), *self.shape[1:])
        return LazyTensor(dtype=self.dtype, shape=shape, load=lambda: self.load(expert_ids))


def write_model(directory: Path, *, spec: ModelSpec, tensors: Sequence[Assembled], num_shards: int) -> None:
    """Write a checkpoint that no training has touched.

    Args:
        directory: of the main file, ``checkpoint.pt``.
        spec: what the model is.
        tensors: of the model.
        num_shards: over which the experts are spread evenly.
    """
    num_experts = spec.routing.num_experts
    per_shard = num_experts // num_shards
    parts = []
    for index in range(num_shards):
        ids = list(range(index * per_shard, (index + 1) * per_shard))
        model = {tensor.name: tensor.lazily(ids) for tensor in tensors}
        aliases = {"decoder.output_projection.weight": _EMBEDDING} if spec.tied else {}
        parts.append(ShardContent(expert_ids=ids, model=dict(model), aliases=aliases))
    writers = [
        share_of(
            index,
            expert_bytes=[part.expert_bytes() for part in parts],
            dense_bytes=parts[0].dense_bytes(),
            aliases=parts[0].aliases,
        )
        for index in range(num_shards)
    ]
    shape = ModelShape(
        num_experts=num_experts,
        top_k=spec.routing.top_k,
        model_dim=spec.model_dim,
        expert_dim=spec.expert_ffn_dim,
        num_layers=spec.num_layers,
    )
    write_checkpoint(
        directory / CHECKPOINT,
        state=_main_state(spec),
        run_id=None,
        update=0,
        shape=shape,
        contents=[part.part(is_written) for part, is_written in zip(parts, writers, strict=True)],
        num_shards=num_shards,
    )


def _main_state(spec: ModelSpec) -> dict[str, Any]:
    """What stock fairseq expects of a checkpoint besides the weights."""
    return {
        "args": None,
        "cfg": complete_settings(flags_of(spec), max_positions=spec.max_positions),
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
    _checkpoint: Checkpoint

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
        cfg = checkpoint.state.get("cfg") or {}
        flags = cfg.get("model") or {}
        rows = checkpoint.tensor(key_of(_EMBEDDING)).shape[0]
        positions = flags.get("max_target_positions") or flags.get("tokens_per_sample")
        if not positions:
            raise CheckpointError(f"{path} does not say how long sequences may be (--max-target-positions).")
        spec = spec_of(flags, vocab_size=rows, max_positions=int(positions))
        settings = cfg.get("checkpoint") or {}
        begun = settings.get("finetune_from_model") or settings.get("restore_file")
        return cls(path=path, spec=spec, restored_from=Path(begun) if begun else None, _checkpoint=checkpoint)

    def names(self) -> list[str]:
        """Of all parameters and buffers, tied ones once."""
        keys = set(self._checkpoint.keys()) - {key_of(alias) for alias in self._checkpoint.aliases()}
        return sorted(key.removeprefix("model/") for key in keys if key.startswith("model/"))

    def tensor(self, name: str) -> LazyTensor:
        """One of them, whole."""
        return self._checkpoint.tensor(key_of(name))

    def row(self, name: str, expert: int) -> Tensor:
        """The row of one expert."""
        return self._checkpoint.tensor(key_of(name), [expert]).load()[0]
