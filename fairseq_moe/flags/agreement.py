"""Find ranks that were started with different flags, before they wait for each other: pure arithmetic."""

from collections.abc import Mapping, Sequence

from fairseq_moe.flags.records import flag_name

__all__ = ["disagreements"]

_MISSING = "not there"


def disagreements(by_rank: Sequence[Mapping[str, str]]) -> list[str]:
    """List one sentence per flag that does not have the same value on every rank.

    Args:
        by_rank: values as text by field name, of each rank in order.
    """
    names = dict.fromkeys(name for values in by_rank for name in values)
    found = []
    for name in names:
        ranks_of: dict[str, list[int]] = {}
        for rank, values in enumerate(by_rank):
            ranks_of.setdefault(values.get(name, _MISSING), []).append(rank)
        if len(ranks_of) > 1:
            said = " and ".join(f"{value} on {_ranks(ranks)}" for value, ranks in ranks_of.items())
            found.append(
                f"{flag_name(name)} is {said}; start all ranks with the same flags and the same code."
            )
    return found


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8])
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}" + (" and more" if len(ranks) > 8 else "")
