"""Assign tensors to shards: each tensor once, about the same number of bytes to every writer."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from fairseq_moe.checkpoint.shards import ShardContent, has_expert_rows
from fairseq_moe.errors import CheckpointError

__all__ = ["assign_owners", "find_aliases", "share_of", "split_content"]


def share_of(
    index: int, *, expert_bytes: Sequence[int], dense_bytes: Mapping[str, int], aliases: Mapping[str, str]
) -> Callable[[str], bool]:
    """Make the function that says whether writer ``index`` writes the tensor (and the optimizer state) of a name.

    Args:
        index: of the writer.
        expert_bytes: of each writer's experts; 0 where another one writes the same experts.
        dense_bytes: of each dense tensor.
        aliases: further names of some of them; they go with their tensor.
    """
    owners = assign_owners(dense_bytes, expert_bytes)

    def is_written(name: str) -> bool:
        if has_expert_rows(name):
            return expert_bytes[index] > 0
        return owners[aliases.get(name, name)] == index

    return is_written


def assign_owners(sizes: Mapping[str, int], loads: Sequence[int]) -> dict[str, int]:
    """Spread tensors over writers: the largest first, each to the writer with the least to write so far.

    Ties go by name and by number, so every rank that calls this with the same numbers gets the same answer.

    Args:
        sizes: bytes of each tensor.
        loads: bytes that each writer has to write anyway (its experts).

    Returns:
        the writer of each tensor.
    """
    loads = list(loads)
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner = loads.index(min(loads))
        owners[name] = owner
        loads[owner] += sizes[name]
    return owners


def find_aliases(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Find names whose tensor is also there under an earlier name (tied weights); returns that name for each."""
    first: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
    return aliases


def split_content(
    content_of: Callable[[Sequence[int]], ShardContent], *, num_experts: int, num_shards: int
) -> list[ShardContent]:
    """Divide the content of a checkpoint over ``num_shards`` shards, as that many ranks would write it.

    Args:
        content_of: everything, with the given experts.
        num_experts: E.
        num_shards: at most E get experts, which must divide evenly over min(num_shards, E).

    Raises:
        CheckpointError: the experts do not divide evenly.
    """
    num_owners = min(num_shards, num_experts)
    if num_shards < 1 or num_experts % num_owners:
        raise CheckpointError(
            f"{num_experts} experts do not divide over {num_shards} shards; choose a divisor of {num_experts}, "
            "or more shards than experts."
        )
    per_shard = num_experts // num_owners
    ids = [range(i * per_shard, (i + 1) * per_shard) for i in range(num_owners)]
    ids += [range(0)] * (num_shards - num_owners)
    parts = [content_of(own) for own in ids]
    expert_bytes = [part.expert_bytes() for part in parts]
    return [
        part.part(
            share_of(index, expert_bytes=expert_bytes, dense_bytes=part.dense_bytes(), aliases=part.aliases)
        )
        for index, part in enumerate(parts)
    ]
