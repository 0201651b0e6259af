"""Count what is neither state nor kept by autograd: rows and messages under way, and a margin."""

from fairseq_moe.planner.mapping import Mapping
from fairseq_moe.planner.shape import ModelShape

__all__ = ["MARGIN_FRAC", "exchange_bytes"]

# Of all else: fragments, workspaces, buffers of NCCL (0.5 to 2 GiB) and unequal loads. --calibrate says what a run had.
MARGIN_FRAC = 0.10


def exchange_bytes(shape: ModelShape, mapping: Mapping, value_bytes: int) -> int:
    """Count rows and messages that are under way and that nothing keeps: one layer's, and those between stages."""
    grid, width = mapping.grid, shape.dim * value_bytes
    found = 0
    if shape.has_experts and grid.expert * grid.expert_tensor > 1:
        found += 2 * mapping.own_tokens * shape.top_k * grid.expert_tensor * width
    if grid.pipe > 1:  # docs/pipelines.md: awaited or not used yet
        found += (4 if mapping.virtual > 1 else 2) * mapping.own_tokens * width
    return found
