"""The adapter's records as Markdown tables."""

from collections.abc import Iterable, Sequence

from fairseq_moe.stock.seam import SEAMS
from fairseq_moe.stock_flags import STOCK_FLAGS

__all__ = ["flags_table", "seams_table"]


def seams_table() -> str:
    """One row per seam: what stock does, why that breaks, what happens instead, and the test."""
    rows = [
        (f"`{seam.target}`", seam.stock_does, seam.breaks, seam.we_do, f"`{seam.test}`")
        for seam in sorted(SEAMS, key=lambda seam: seam.target)
    ]
    return _table(("seam", "stock", "why it breaks", "here", "test"), rows)


def flags_table() -> str:
    """One row per stock flag that touches an MoE model."""
    rows = [
        (f"`{row.flag}`", f"refused: {row.reason}" if row.reason else f"supported, `{row.test}`")
        for row in STOCK_FLAGS
    ]
    return _table(("stock flag", "with an MoE model"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
