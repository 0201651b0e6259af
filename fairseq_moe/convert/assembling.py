"""Make our tensors of Hugging Face's while they are written: at no time is more than one of them in memory."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fairseq_moe.convert.hf.directory import TensorDir
from fairseq_moe.convert.hf.layout import OUR_WAY, take
from fairseq_moe.convert.hf.names import OurTensor
from fairseq_moe.convert.original_blocks import BlockKeeper
from fairseq_moe.convert.store import Assembled

__all__ = ["assembled"]


def assembled(
    tensors: TensorDir, tensor: OurTensor, keeper: BlockKeeper, advance: Callable[[int], None]
) -> Assembled:
    """Say how one of our tensors is made.

    Args:
        tensors: of the other side.
        tensor: ours.
        keeper: is told of experts that came as MXFP4.
        advance: is told the bytes that are read.
    """
    dtype = tensors.dtype(tensor.blocks[0].name)

    def load(expert_ids: Sequence[int] | None) -> Tensor:
        blocks = tensor.blocks
        if expert_ids is not None and blocks[0].expert is not None:
            blocks = tuple(block for block in blocks if block.expert in expert_ids)
        for block in blocks:
            num_bytes = sum(stored.num_bytes for stored in tensors.parts(block.name).values())
            share = (
                1.0 if block.expert is not None or expert_ids is None else len(expert_ids) / tensor.shape[0]
            )
            advance(int(num_bytes * share))
        one = blocks[0]
        if len(blocks) == 1 and one.expert is None and one.layout == OUR_WAY:
            rows = None if expert_ids is None else (expert_ids[0], expert_ids[-1] + 1)
            found = tensors.read(one.name, rows=rows)
            return found if expert_ids is not None else found.reshape(tensor.shape)
        shape = tensor.shape if expert_ids is None else (len(expert_ids), *tensor.shape[1:])
        whole = torch.empty(shape, dtype=dtype)
        if one.layout != OUR_WAY:
            assert expert_ids is not None
            # One at a time: a whole stack and its other form would be twice as much.
            for row, expert in zip(whole, expert_ids, strict=True):
                row.copy_(take(tensors.read(one.name, rows=(expert, expert + 1))[0], one.layout))
                keeper.note(one.name, expert, row)
            return whole
        for block in blocks:
            place = (
                whole if block.expert is None or expert_ids is None else whole[block.expert - expert_ids[0]]
            )
            place[block.first_row : block.first_row + block.shape[0]] = tensors.read(block.name)
        return whole

    return Assembled(name=tensor.name, shape=tensor.shape, dtype=dtype, load=load)
