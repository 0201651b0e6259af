"""Say what a tensor that goes to Hugging Face is made of: a tensor of ours, or blocks that the model came with."""

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fairseq_moe.checkpoint import has_expert_rows
from fairseq_moe.convert.finite import refuse_not_finite
from fairseq_moe.convert.hf.file import StoredTensor
from fairseq_moe.convert.hf.layout import put
from fairseq_moe.convert.hf.mxfp4 import parts_of
from fairseq_moe.convert.hf.names import Block, OurTensor
from fairseq_moe.convert.original_blocks import OriginalBlocks, rows_of
from fairseq_moe.convert.store import StoredModel

__all__ = ["Output", "with_originals"]


@dataclass(frozen=True, kw_only=True)
class Output:
    """Say where a tensor that is to be written comes from.

    Args:
        source: our tensor.
        block: its place in that.
        dtype: in which it is written.
        original: blocks or scales that are written in its place; None: it is made of ours.
    """

    source: OurTensor
    block: Block
    dtype: torch.dtype
    original: StoredTensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in which it is written."""
        return self.block.shape if self.original is None else self.original.shape

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize

    @property
    def num_parameters(self) -> int:
        """Parameters of the model that it holds: two in each byte of blocks, none in scales."""
        if self.original is None:
            return int(torch.Size(self.shape).numel())
        return 2 * self.num_bytes if len(self.shape) == 4 else 0

    def pieces(self, model: StoredModel) -> Iterator[Tensor]:
        """Make the tensor; of a stack of experts one after the other, each finite."""
        if self.original is not None:
            yield from rows_of(self.original)
            return
        block, source = self.block, self.source
        experts: Iterable[int | None] = [block.expert]
        if block.expert is None and has_expert_rows(source.name):
            experts = range(source.shape[0])
        for expert in experts:
            whole = model.tensor(source.name) if expert is None else model.row(source.name, expert)
            if len(source.blocks) > 1:
                whole = whole[block.first_row : block.first_row + block.shape[0]]
            theirs = put(whole, block.layout)
            tensor = theirs.to(self.dtype).contiguous()
            if not has_expert_rows(source.name):
                tensor = tensor.reshape(block.shape)
            refuse_not_finite(
                tensor,
                name=source.name,
                file=model.file_of(source.name, expert),
                before=functools.partial(torch.clone, theirs),
                flag="--dtype",
            )
            yield tensor


def with_originals(
    outputs: Mapping[str, Output], originals: OriginalBlocks, untouched: Collection[str]
) -> dict[str, Output]:
    """Put blocks and scales in the places of these weights."""
    found: dict[str, Output] = {}
    for name, output in outputs.items():
        if name not in untouched:
            found[name] = output
            continue
        for part in parts_of(name):
            stored = originals.parts[part]
            found[part] = replace(output, dtype=stored.dtype, original=stored)
    return found
