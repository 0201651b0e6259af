"""Make a stock dense checkpoint of an MoE checkpoint: one expert, or the mean of them, is the layer's network."""

import re
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from fairseq_moe.checkpoint import LazyTensor, ShardContent, damage_as_sentence, has_expert_rows
from fairseq_moe.checkpoint_tools.averaging import mean_of
from fairseq_moe.checkpoint_tools.output import check_target, write_dense
from fairseq_moe.checkpoint_tools.source import Source, open_source
from fairseq_moe.errors import CheckpointError
from fairseq_moe.flags.blocks import BlocksConfig
from fairseq_moe.flags.records import changed_fields, declared_fields, flag_name
from fairseq_moe.models.flags import MODEL_RECORDS
from fairseq_moe.progress import progress
from fairseq_moe.stock.checkpoint.untrusted import refuse_programs

__all__ = ["MODEL_FLAGS_OF_PLUGIN", "to_dense"]

_MATRIX = re.compile(r"(?P<layer>.+)\.moe_layer\.experts\.(?P<matrix>fc[12])_(?P<kind>weight|bias)")
_WIDTH = re.compile(r".+\.layers\.\d+\.fc1\.weight")

# What an MoE model's configuration says beyond that of a stock one, which drops what it does not know; but this
# package would read a dense checkpoint's moe_freq.
MODEL_FLAGS_OF_PLUGIN = frozenset(
    {entry.name for record in MODEL_RECORDS for entry in declared_fields(record)} | {"batch_size"}
)


def to_dense(path: Path, to: Path, *, expert: int | None) -> None:
    """Write a checkpoint that stock fairseq loads without this package.

    Its feed-forward networks compute what the MoE layers would if every token's weights summed to one and all
    experts were the chosen one. Needs memory for the dense model. Data types stay; there is no optimizer state.

    Args:
        path: of the MoE checkpoint.
        to: the new file.
        expert: global id of the expert that every layer takes; None: the mean of all experts.

    Raises:
        CheckpointError: the checkpoint is dense or damaged, has shared experts, blocks that stock does not know,
            flags that stock would run, or dense layers of another width than the experts; there is no such expert;
            or ``to`` is taken or cannot be written.
    """
    check_target(to)
    source = open_source(path)
    if source.shape is None:
        raise CheckpointError(f"{path} is a {source.kind}; there are no experts in it to choose from.")
    num_experts = source.shape.num_experts
    if expert is not None and not 0 <= expert < num_experts:
        raise CheckpointError(f"--expert is {expert}, expected 0 to {num_experts - 1}: {path} has that many.")
    with damage_as_sentence(path):
        _check_blocks(path, source.state["cfg"]["model"])
    with progress("verifying", source.unverified_bytes) as advance:
        source.require_intact(advance)
    ids = range(num_experts) if expert is None else [expert]
    content = _dense_content(source, ids)
    width = _width(source.path, content)
    with damage_as_sentence(path):
        state = _stock_state(source.state, width)
        flags = OmegaConf.create(state["cfg"], flags={"allow_objects": True})
    for group in ("model", "task"):
        refuse_programs(flags.get(group))  # stock alone would run them
    write_dense(to, state=state, content=content)


def _check_blocks(path: Path, model_flags: dict[str, Any]) -> None:
    """Refuse layers that stock cannot build, with experts or without."""
    given = [flag_name(name) for name in changed_fields(BlocksConfig.from_args(model_flags))]
    if given:
        raise CheckpointError(
            f"the model in {path} has blocks that stock fairseq does not know ({', '.join(given)}); it cannot "
            "become a checkpoint of stock fairseq."
        )


def _dense_content(source: Source, ids: Iterable[int]) -> ShardContent:
    """Collect the dense tensors, and the networks that those experts become."""
    contents = [source.content([expert], with_optimizer=False) for expert in ids]
    content = ShardContent(aliases=contents[0].aliases)
    for name in contents[0].model:
        if ".moe_layer.shared_experts." in name:
            raise CheckpointError(
                f"{source.path} has shared experts ({name}), which a stock layer has no place for; such a model "
                "cannot become a dense one."
            )
        tensors = [_lazy(each.model[name]) for each in contents]
        if (match := _MATRIX.fullmatch(name)) is not None:
            content.model[f"{match['layer']}.{match['matrix']}.{match['kind']}"] = _network(tensors, name)
        elif ".moe_layer." not in name:  # what is left of an MoE layer is its router
            content.model[name] = tensors[0]
        elif has_expert_rows(name):
            raise CheckpointError(f"{source.path} has {name}, which is no matrix of an expert that is known.")
    return content


def _lazy(value: LazyTensor | Tensor) -> LazyTensor:
    assert isinstance(value, LazyTensor)
    return value


def _network(experts: list[LazyTensor], name: str) -> LazyTensor:
    """Average one row of each expert tensor into a dense one, in the type of the experts."""
    first = experts[0]
    mean = mean_of(experts, name)
    return LazyTensor(
        dtype=first.dtype, shape=first.shape[1:], load=lambda: mean.load()[0].to(first.dtype).clone()
    )


def _width(path: Path, content: ShardContent) -> int:
    """Find the hidden width of all layers, which must be one in a stock model."""
    widths = {name: tensor.shape[0] for name, tensor in content.model.items() if _WIDTH.fullmatch(name)}
    if len(set(widths.values())) != 1:
        raise CheckpointError(
            f"the layers of {path} would have networks of the widths {sorted(set(widths.values()))}, and all layers "
            "of a stock model have one width; such a model cannot become a dense one."
        )
    return next(iter(widths.values()))


def _stock_state(state: dict[str, Any], width: int) -> dict[str, Any]:
    """Remove from the main file's content what only this package knows.

    Flags that stock keeps in a Namespace become a dictionary: its own loader refuses the former since torch 2.6.
    """
    groups = {
        name: dict(vars(group)) if isinstance(group, Namespace) else group
        for name, group in state["cfg"].items()
    }
    model = {name: value for name, value in groups["model"].items() if name not in MODEL_FLAGS_OF_PLUGIN}
    groups["model"] = {**model, "decoder_ffn_embed_dim": width}
    history = [dict(entry) for entry in state["optimizer_history"]]
    criterion = groups.get("criterion") or {}
    if criterion.get("_name") == "moe_cross_entropy":
        groups["criterion"] = {
            "_name": "cross_entropy",
            "sentence_avg": criterion.get("sentence_avg", False),
        }
        history[-1]["criterion_name"] = "CrossEntropyCriterion"
    if isinstance(groups.get("common"), dict):
        groups["common"] = {**groups["common"], "user_dir": None}
    return {**state, "cfg": groups, "optimizer_history": history, "last_optimizer_state": None}
