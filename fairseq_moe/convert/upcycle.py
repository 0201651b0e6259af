"""Upcycle a dense model: experts begin as copies, or slices, of its networks (arXiv 2212.05055, 2410.07524).

Expert j holds slice j mod G of the dense network's hidden units, and the router's rows are alike within each run of
G experts, so that the G slices of a network are chosen together. Weights are the softmax over the chosen k, so each
slice of a run weighs a G-th of it: the matrices of a slice are scaled by G together. The output is the dense model's
for G = 1, and for any G with ReLU, for which f(s x) = s f(x).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_moe.checkpoint import ModelShape, find_aliases
from fairseq_moe.convert.dense_model import DenseModel
from fairseq_moe.convert.directories import appearing
from fairseq_moe.convert.finite import refuse_not_finite
from fairseq_moe.convert.store import CHECKPOINT, Assembled, fresh_state, write_tensors
from fairseq_moe.errors import CheckpointError
from fairseq_moe.flags.megatron import moe_layer_pattern

__all__ = ["Upcycled", "upcycle"]

_ROUTER_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class Upcycled:
    """Record the checkpoint that upcycling has made.

    Args:
        target: main file of the checkpoint.
        flags: those that fairseq-train needs beside the dense model's.
        is_equal: whether the model computes what the dense one computes.
    """

    target: Path
    flags: dict[str, Any]
    is_equal: bool


def upcycle(
    source: Path,
    target: Path,
    *,
    num_experts: int,
    top_k: int,
    granularity: int = 1,
    layers: str = "1",
    num_shards: int = 1,
    seed: int = 1,
) -> Upcycled:
    """Make a checkpoint with experts from a dense one.

    Args:
        source: a dense checkpoint of a ``transformer_lm``, stock's or of our blocks.
        target: directory to be made.
        num_experts: E.
        top_k: experts per token, a multiple of the granularity.
        granularity: G, slices that each network is cut into.
        layers: which layers get experts, as --moe-layer-freq.
        num_shards: over which the experts are spread.
        seed: of the router's rows.

    Raises:
        CheckpointError: the sizes do not fit, or ``source`` is no such checkpoint.
    """
    dense = DenseModel.read(source)
    model, is_gated, hidden_dim = dense.tensors, dense.is_gated, dense.hidden_dim
    _check_sizes(num_experts, top_k, granularity, hidden_dim, num_shards, seed)
    is_moe = _pattern(layers, dense.num_layers)
    flags = {
        "num_experts": num_experts,
        "moe_router_topk": top_k,
        "moe_ffn_hidden_size": hidden_dim // granularity,
        "moe_layer_freq": layers,
        "moe_aux_loss_coeff": "0.01",
    }
    aliases = find_aliases(model)
    cut = partial(_expert_stack, num_slices=granularity, is_gated=is_gated)
    tensors = [
        entry
        for name in model
        if name not in aliases
        for entry in _converted(name, model, is_moe, num_experts, cut, source)
    ]
    tensors += _routers(is_moe, num_experts, granularity, dense.model_dim, seed)
    shape = ModelShape(
        num_experts=num_experts,
        top_k=top_k,
        model_dim=dense.model_dim,
        expert_dim=hidden_dim // granularity,
        num_layers=len(is_moe),
    )
    with appearing(target) as directory:
        fresh = fresh_state({**dense.settings, "model": {**dense.flags, **flags}})
        write_tensors(
            directory, state=fresh, shape=shape, tensors=tensors, aliases=aliases, num_shards=num_shards
        )
    is_equal = granularity == 1 or (not is_gated and dense.flags.get("activation_fn", "relu") == "relu")
    return Upcycled(target=target / CHECKPOINT, flags=flags, is_equal=is_equal)


def _pattern(layers: str, num_layers: int) -> list[bool]:
    try:
        is_moe = moe_layer_pattern(layers, num_layers)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if not any(is_moe):
        raise CheckpointError(f"--moe-layer-freq {layers} gives no layer experts; mark at least one.")
    return is_moe


def _check_sizes(
    num_experts: int, top_k: int, granularity: int, hidden_dim: int, num_shards: int, seed: int
) -> None:
    slices = f"--granularity {granularity}"
    checks = (
        (hidden_dim % granularity, f"a width of {hidden_dim} does not divide by {slices}"),
        (num_experts % granularity, f"--num-experts {num_experts} is no multiple of {slices}"),
        (
            top_k % granularity or not 2 <= top_k <= num_experts,
            f"--topk {top_k} is no multiple of {slices} from 2 to --num-experts",
        ),
        (num_experts % num_shards, f"{num_experts} experts do not divide over {num_shards} shards"),
        (not 0 <= seed < 2**64, f"--seed {seed} is not a number of 64 bits"),
    )
    for is_bad, text in checks:
        if is_bad:
            raise CheckpointError(f"{text}; choose other numbers.")


def _routers(
    is_moe: Sequence[bool], num_experts: int, granularity: int, dim: int, seed: int
) -> list[Assembled]:
    """Draw random rows, each repeated for the slices of one network."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index, has_experts in enumerate(is_moe):
        if has_experts:
            rows = torch.randn(num_experts // granularity, dim, generator=generator) * _ROUTER_STD
            name = f"decoder.layers.{index}.moe_layer.router.weight"
            found.append(_whole(name, rows.repeat_interleave(granularity, 0)))
    return found


def _whole(name: str, tensor: Tensor, file: Path | None = None) -> Assembled:
    """Read a tensor as it is; one from a file is refused if it is not finite."""

    def load(expert_ids: Sequence[int] | None) -> Tensor:
        if file is not None:
            refuse_not_finite(tensor, name=name, file=file)
        return tensor

    return Assembled(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype, load=load)


def _converted(
    name: str, model: dict[str, Tensor], is_moe: Sequence[bool], num_experts: int, cut: Any, file: Path
) -> list[Assembled]:
    """Convert a tensor of the dense model to itself, or to the stack of experts that it becomes."""
    parts = name.split(".")
    is_network = parts[:2] == ["decoder", "layers"] and parts[3] in ("fc1", "fc2") and is_moe[int(parts[2])]
    if not is_network:
        return [_whole(name, model[name], file)]
    layer, (matrix, kind) = ".".join(parts[:3]), parts[3:]
    first = cut(model[name], matrix=matrix, kind=kind, expert_ids=[0])

    def load(expert_ids: Sequence[int] | None) -> Tensor:
        refuse_not_finite(model[name], name=name, file=file)
        stack: Tensor = cut(model[name], matrix=matrix, kind=kind, expert_ids=expert_ids)
        return stack

    return [
        Assembled(
            name=f"{layer}.moe_layer.experts.{matrix}_{kind}",
            shape=(num_experts, *first.shape[1:]),
            dtype=first.dtype,
            load=load,
        )
    ]


def _expert_stack(
    dense: Tensor, *, matrix: str, kind: str, expert_ids: Sequence[int], num_slices: int, is_gated: bool
) -> Tensor:
    """Stack the slices of ``dense`` that these experts hold, scaled."""
    scale = num_slices ** (1 / 3 if is_gated else 1 / 2)
    if matrix == "fc2" and kind == "bias":  # weights sum to 1
        return dense.repeat(len(expert_ids), 1)
    if matrix == "fc2":
        slices = list(dense.chunk(num_slices, dim=1))
    elif is_gated:
        gate, up = (half.chunk(num_slices) for half in dense.chunk(2))
        slices = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
    else:
        slices = list(dense.chunk(num_slices))
    return torch.stack([slices[expert % num_slices] for expert in expert_ids]) * scale
