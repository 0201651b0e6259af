"""Read MXFP4 weights: 32 values of four bits each share a scale, a power of two; bfloat16 holds every product exactly.

A weight X of a stack of experts lies in two tensors. ``X_blocks`` is uint8 (E, outputs, groups, 16), each byte two
codes, the lower half first; ``X_scales`` is uint8 (E, outputs, groups), the exponent plus 127. X itself has the shape
(E, inputs, outputs), in which transformers holds it and saves it plain.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fairseq_moe.convert.hf.file import StoredTensor
from fairseq_moe.errors import CheckpointError

__all__ = [
    "BLOCKS",
    "NAN_SCALE",
    "SCALES",
    "VALUES",
    "check_blocks",
    "decoded",
    "is_part",
    "parts_of",
    "unpacked_names",
    "unpacked_shape",
]

BLOCKS = "_blocks"
SCALES = "_scales"
NAN_SCALE = 255  # of the OCP's format for scales, which has no infinity
_BLOCK_BYTES = 16
# Of the OCP's format e2m1: a sign, two bits of exponent, one of mantissa.
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_PAIRS = (
    torch.tensor([(VALUES[byte & 15], VALUES[byte >> 4]) for byte in range(256)], dtype=torch.bfloat16)
    .view(torch.int32)
    .view(-1)
)
_POWERS = torch.tensor(
    [2.0 ** (scale - 127) for scale in range(NAN_SCALE)] + [torch.nan], dtype=torch.bfloat16
)
_GROUPS_AT_ONCE = 8192  # what is made on the way stays in the cache


def decoded(blocks: Tensor, scales: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Multiply the values of blocks with their scales, exactly in bfloat16 and float32.

    Scales from 0 (2**-127) to 252 (2**125) leave every product in bfloat16's range, the smallest as subnormal numbers.
    With 253 and 254 the largest values, from 4 and from 2 up, become infinite, as in float32; 255 is NaN.

    Args:
        blocks: uint8 (..., groups, 16).
        scales: uint8 (..., groups).
        dtype: of the result; each product is rounded to it, if that is needed.

    Returns:
        (..., groups * 32).
    """
    result = torch.empty((*scales.shape, 2 * _BLOCK_BYTES), dtype=dtype)
    flat_blocks, flat_scales = blocks.reshape(-1), scales.reshape(-1)
    flat_result = result.view(-1, 2 * _BLOCK_BYTES)
    for start in range(0, flat_result.shape[0], _GROUPS_AT_ONCE):
        end = start + _GROUPS_AT_ONCE
        # A pair of values is looked up as one number.
        codes = flat_blocks[start * _BLOCK_BYTES : end * _BLOCK_BYTES].int()
        values = _PAIRS.index_select(0, codes).view(torch.bfloat16).view(-1, 2 * _BLOCK_BYTES)
        powers = _POWERS.index_select(0, flat_scales[start:end].int())
        flat_result[start:end] = values.mul_(powers[:, None])
    return result.flatten(-2)


def parts_of(name: str) -> tuple[str, str]:
    """Name the blocks and the scales of a weight."""
    return name + BLOCKS, name + SCALES


def is_part(name: str, stored: StoredTensor) -> bool:
    """Tell whether a tensor is blocks or scales."""
    return name.endswith((BLOCKS, SCALES)) and stored.dtype == torch.uint8


def unpacked_names(names: Collection[str]) -> Iterator[str]:
    """Put the name of a weight in the place of its blocks', and leave out its scales."""
    present = set(names)
    for name in names:
        weight = name.removesuffix(BLOCKS).removesuffix(SCALES)
        if weight == name or not present.issuperset(parts_of(weight)):
            yield name
        elif name.endswith(BLOCKS):
            yield weight


def unpacked_shape(blocks: StoredTensor) -> tuple[int, ...]:
    """Give the shape of what blocks mean: (E, inputs, outputs)."""
    num_experts, outputs, groups, size = blocks.shape
    return num_experts, 2 * groups * size, outputs


def check_blocks(path: Path, stored: Mapping[str, StoredTensor], *, is_declared: bool) -> None:
    """Refuse blocks and scales that do not belong together.

    Args:
        path: of the directory.
        stored: its tensors.
        is_declared: its config.json says that weights are MXFP4.

    Raises:
        CheckpointError: for the first of them.
    """
    for name, tensor in stored.items():
        if not is_declared and tensor.dtype != torch.uint8:
            continue
        if name.endswith(BLOCKS):
            _check_pair(path, stored, name.removesuffix(BLOCKS), is_declared)
        elif name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS not in stored:
            raise CheckpointError(
                f"{name} of {path} scales blocks that are not there; fetch the model again."
            )


def _check_pair(path: Path, stored: Mapping[str, StoredTensor], weight: str, is_declared: bool) -> None:
    blocks_name, scales_name = parts_of(weight)
    if not is_declared:
        raise CheckpointError(
            f"{blocks_name} of {path} is MXFP4, and config.json has no quantization_config with quant_method mxfp4."
        )
    if weight in stored:
        raise CheckpointError(
            f"{path} has both {weight} and {blocks_name}, so nobody can tell which is the model; remove one."
        )
    if scales_name not in stored:
        raise CheckpointError(
            f"{blocks_name} of {path} is MXFP4 and has no {scales_name}; without it its values are unknown."
        )
    blocks, scales = stored[blocks_name], stored[scales_name]
    if blocks.dtype != torch.uint8 or len(blocks.shape) != 4 or blocks.shape[-1] != _BLOCK_BYTES:
        raise CheckpointError(
            f"{blocks_name} of {path} is {blocks.dtype} of shape {blocks.shape}, expected uint8 of shape (experts, "
            f"outputs, groups, {_BLOCK_BYTES})."
        )
    if scales.dtype != torch.uint8 or scales.shape != blocks.shape[:-1]:
        raise CheckpointError(
            f"{scales_name} of {path} is {scales.dtype} of shape {scales.shape}, expected uint8 of shape "
            f"{blocks.shape[:-1]} for blocks of shape {blocks.shape}."
        )
