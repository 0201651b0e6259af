"""Tensors by name, joined from the parts that ranks hold of them, and cut into these again."""

from typing import Any

from torch import Tensor, nn

from fairseq_moe.distributed.joining import cut_part, is_part, join_parts, part_shape, whole_numel
from fairseq_moe.distributed.mesh import ParallelMesh
from fairseq_moe.parallel.placement import Placement, placement_of
from fairseq_moe.stock.find_experts import moe_decoder
from fairseq_moe.stock.run import run_of

__all__ = ["Parts", "has_shape"]


class Parts:
    """Join and cut the tensors of a model that its ranks hold in parts; those of any other name stay as they are.

    Args:
        model: with placements on its parameters; None: nothing is in parts.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._in_parts: dict[str, tuple[Placement, ParallelMesh]] = {}
        decoder = None if model is None else moe_decoder(model)
        if model is None or decoder is None or decoder.mesh is None:
            return
        run = run_of(decoder)
        # A sharded model's own parameters are at times gathered ones, which carry no placement.
        for name, p in model.named_parameters() if run is None else run.state.named_parameters():
            if is_part(placement_of(p), decoder.mesh):
                self._in_parts[name] = placement_of(p), decoder.mesh
        first: dict[int, str] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            known = first.setdefault(id(p), name)
            if known in self._in_parts:  # tied parameters have further names
                self._in_parts[name] = self._in_parts[known]

    def join(self, name: str, value: Any) -> Any:
        """Join a parameter, or what the optimizer keeps in its shape; collective."""
        in_parts = self._in_parts.get(name)
        return value if in_parts is None or not has_shape(value) else join_parts(value, *in_parts)

    def cut(self, name: str, value: Any) -> Any:
        """Cut this rank's part out of what ``join`` gives."""
        in_parts = self._in_parts.get(name)
        return value if in_parts is None or not has_shape(value) else cut_part(value, *in_parts)

    def cut_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Find the shape of this rank's part."""
        in_parts = self._in_parts.get(name)
        return shape if in_parts is None else part_shape(shape, *in_parts)

    def whole_numel(self, name: str, numel: int) -> int:
        """Count the elements of what ``join`` gives."""
        in_parts = self._in_parts.get(name)
        return numel if in_parts is None else whole_numel(numel, *in_parts)


def has_shape(value: Any) -> bool:
    """Tell what the optimizer keeps in a parameter's shape from its numbers, which may be scalar tensors."""
    return isinstance(value, Tensor) and value.dim() > 0
