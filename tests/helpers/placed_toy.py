"""A toy model with a parameter of every placement, cut for this rank; its gradients and those of one process.

What a rank adds to a gradient depends on which tokens it sees; ``TOKENS_OVER`` says by hand over which axes ranks see
other ones, so it is no echo of the placement table. For forked ranks only.
"""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from fairseq_moe.distributed import ParallelMesh, gather_values
from fairseq_moe.distributed.joining import cut_part, join_parts
from fairseq_moe.models.decoder import MoEDecoder
from fairseq_moe.modules import Experts
from fairseq_moe.parallel.placement import (
    DENSE,
    TENSOR_COLUMNS,
    TENSOR_GATED_ROWS,
    TENSOR_ROWS,
    Placement,
    expert_placements,
    place,
    placement_of,
    vocabulary_placement,
)

__all__ = ["NUM_EXPERTS", "TOKENS_OVER", "Toy", "build_toy", "expected_gradients", "join", "whole"]

NUM_EXPERTS, _WORDS = 4, 7
_LAYER, _EXPERTS = "layers.0", "layers.0.moe_layer.experts"
_BY_TOKENS_OF_A_TENSOR_GROUP, _OWN_TOKENS = ("data", "context"), ("data", "context", "tensor")
# Name -> shape of the whole, and the axes along which ranks see other tokens (and so add something else).
SHAPES: dict[str, tuple[int, ...]] = {
    "embed_tokens.weight": (_WORDS, 6),
    f"{_LAYER}.rows": (8, 6),
    f"{_LAYER}.rows_bias": (8,),
    f"{_LAYER}.gated": (8, 6),
    f"{_LAYER}.columns": (6, 8),
    f"{_LAYER}.router": (NUM_EXPERTS, 6),
    f"{_EXPERTS}.fc1_weight": (NUM_EXPERTS, 8, 6),
    f"{_EXPERTS}.fc1_bias": (NUM_EXPERTS, 8),
    f"{_EXPERTS}.fc2_weight": (NUM_EXPERTS, 6, 4),
    f"{_EXPERTS}.fc2_bias": (NUM_EXPERTS, 6),
}
TOKENS_OVER = {
    **dict.fromkeys(SHAPES, _BY_TOKENS_OF_A_TENSOR_GROUP),
    f"{_LAYER}.router": _OWN_TOKENS,
    **{name: ("expert_replica",) for name in SHAPES if name.startswith(_EXPERTS)},
}
ALIAS = "output_projection.weight"


def whole(name: str, seed: int) -> Tensor:
    """Draw a whole tensor in the shape of a parameter."""
    generator = torch.Generator().manual_seed(100 * seed + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)


class Toy(MoEDecoder):
    """Hold the parameters where a decoder has them; the loss is linear in each."""

    def __init__(self, mesh: ParallelMesh) -> None:
        nn.Module.__init__(self)
        self.mesh = mesh
        self.moe = SimpleNamespace(enabled=True, moe_normalize_expert_grad="world_size")  # type: ignore[assignment]
        self.embed_tokens, self.output_projection = nn.Module(), nn.Module()
        layer, experts = _Scored(), _ScoredExperts()
        layer.moe_layer = nn.Module()
        layer.moe_layer.experts = experts
        self.layers = nn.ModuleList([layer])
        stacks = expert_placements(is_gated=True, is_cut=mesh.ranks.expert_tensor > 1)
        for name in SHAPES:
            path, _, own = name.rpartition(".")
            placement = stacks[own] if path == _EXPERTS else _DENSE_PLACEMENTS[own]
            parameter = nn.Parameter(self.cut(whole(name, 0), placement))
            place([parameter], placement)
            self.get_submodule(path).register_parameter(own, parameter)
        self.output_projection.weight = self.embed_tokens.weight

    def cut(self, tensor: Tensor, placement: Placement) -> Tensor:
        """Cut this rank's part out of a whole tensor."""
        assert self.mesh is not None
        ids = self.mesh.layout.local_ids(self.mesh.rank)
        own = tensor[ids.start : ids.stop] if "expert" in placement.cut_over else tensor
        return cut_part(own, placement, self.mesh).clone()

    def forward(self, factors: dict[str, Tensor]) -> Tensor:
        """Sum all parameters times their factors, layer by layer."""
        found: Tensor = (self.embed_tokens.weight * factors["embed_tokens.weight"]).sum()
        for layer in self.layers:
            found = found + layer(factors)
        return found


class _Scored(nn.Module):
    def forward(self, factors: dict[str, Tensor]) -> Tensor:
        own = [(p * factors[f"{_LAYER}.{name}"]).sum() for name, p in self.named_parameters(recurse=False)]
        experts: Tensor = self.moe_layer.experts(factors)
        return torch.stack(own).sum() + experts


class _ScoredExperts(Experts):
    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self, factors: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        own = [(p * factors[f"{_EXPERTS}.{name}"]).sum() for name, p in self.named_parameters()]
        return torch.stack(own).sum()


_DENSE_PLACEMENTS = {
    "weight": vocabulary_placement(_WORDS),
    "rows": TENSOR_ROWS,
    "rows_bias": TENSOR_ROWS,
    "gated": TENSOR_GATED_ROWS,
    "columns": TENSOR_COLUMNS,
    "router": DENSE,
}


def build_toy(mesh: ParallelMesh) -> tuple[Toy, dict[str, Tensor]]:
    """Make the toy, and the factors of its loss on this rank: what the rank's tokens add to each gradient."""
    toy, factors = Toy(mesh), {}
    for name, p in toy.named_parameters():
        tokens = _place_along(mesh, TOKENS_OVER[name])
        factor = toy.cut(whole(name, 1 + tokens), placement_of(p))
        # One of the ranks that hold parts of an expert adds its second bias.
        adds = not name.endswith("fc2_bias") or mesh.ranks.coordinate(mesh.rank, "expert_tensor") == 0
        factors[name] = factor if adds else torch.zeros_like(factor)
    return toy, factors


def expected_gradients(mesh: ParallelMesh) -> dict[str, Tensor]:
    """Add up what all tokens add to each whole gradient, by the number of data ranks."""
    return {
        name: torch.stack([whole(name, 1 + tokens) for tokens in range(mesh.ranks.size(axes))]).sum(0)
        / mesh.ranks.data
        for name, axes in TOKENS_OVER.items()
    }


def join(toy: Toy, name: str, part: Tensor, placement: Placement) -> Tensor:
    """Join a part, experts with those of other ranks; collective."""
    assert toy.mesh is not None
    joined = join_parts(part, placement, toy.mesh)
    if "expert" not in placement.cut_over:
        return joined
    by_ids = {
        ids.start: rows for ids, rows in gather_values((toy.mesh.layout.local_ids(toy.mesh.rank), joined))
    }
    return torch.cat([by_ids[first] for first in sorted(by_ids)])


def _place_along(mesh: ParallelMesh, axes: tuple[str, ...]) -> int:
    place = 0
    for axis in axes:
        place = place * mesh.ranks.size([axis]) + mesh.ranks.coordinate(mesh.rank, axis)
    return place
