"""Who writes what: each tensor once, about the same number of bytes for every writer."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from fairseq_moe.checkpoint.shards import has_expert_rows

__all__ = ["assign_owners", "find_aliases", "share_of"]


def share_of(
    index: int, *, expert_bytes: Sequence[int], dense_bytes: Mapping[str, int], aliases: Mapping[str, str]
) -> Callable[[str], bool]:
    """Whether writer ``index`` writes the tensor (and the optimizer state) of a name.

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
    """Names whose tensor is also there under an earlier name (tied weights), with that name."""
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
