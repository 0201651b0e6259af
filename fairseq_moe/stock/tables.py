"""Print what the code declares as Markdown tables, for the pages in docs/: our flags, stock's, seams, resuming."""

from collections.abc import Iterable, Sequence

from fairseq_moe.flags.gate_loss import GateLossConfig
from fairseq_moe.flags.records import Group, declared_fields, flag_name
from fairseq_moe.flags.stock import STOCK_FLAGS
from fairseq_moe.models.flags import MODEL_RECORDS
from fairseq_moe.stock.checkpoint.changes import RESUME_RULES
from fairseq_moe.stock.seam import SEAMS

__all__ = ["own_flags_tables", "resume_table", "seams_table", "stock_flags_table"]


def seams_table() -> str:
    """Print one row per seam: our file, what stock does, why that breaks, what happens instead, and the test."""
    rows = [
        (
            f"`{seam.target}`",
            f"`{seam.replacement.__module__.replace('.', '/')}.py`",
            seam.stock_does,
            seam.breaks,
            seam.we_do,
            f"`{seam.test}`",
        )
        for seam in sorted(SEAMS, key=lambda seam: seam.target)
    ]
    return _table(("seam", "our file", "stock", "why it breaks", "here", "test"), rows)


def own_flags_tables() -> str:
    """Print a heading and a table per group of flags that the plugin adds, with default and help of each."""
    declared = [field for record in (*MODEL_RECORDS, GateLossConfig) for field in declared_fields(record)]
    parts = []
    for group in Group:
        rows = [
            (f"`{flag_name(field.name)}`", f"{field.default}", field.metadata["help"])
            for field in declared
            if field.metadata["group"] is group
        ]
        parts.append(f"### {group.value}\n\n{_table(('flag', 'default', 'meaning'), rows)}")
    return "\n\n".join(parts)


def stock_flags_table() -> str:
    """Print one row per stock flag that touches an MoE model."""
    rows = [
        (f"`{entry.flag}`", f"refused: {entry.reason}" if entry.reason else f"supported, `{entry.test}`")
        for entry in STOCK_FLAGS
    ]
    return _table(("stock flag", "with an MoE model"), rows)


def resume_table() -> str:
    """Print one row per flag that may change between two starts of a run: what then happens, and the test."""
    rows = [
        (
            f"`{rule.flag}`" if rule.flag.startswith("--") else rule.flag,
            rule.text if rule.until is None else f"refused without `{rule.until}`: {rule.text}",
            f"`{rule.test}`",
        )
        for rule in RESUME_RULES
    ]
    return _table(("what has another value", "what happens", "test"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
