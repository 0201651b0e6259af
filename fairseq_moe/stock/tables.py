"""The adapter's records as Markdown tables."""

from collections.abc import Iterable, Sequence
from dataclasses import fields

from fairseq.models.transformer_lm import TransformerLanguageModelConfig

from fairseq_moe.criterions.moe_cross_entropy import MoECrossEntropyCriterionConfig
from fairseq_moe.flags.stock import STOCK_FLAGS
from fairseq_moe.models.moe_transformer_lm import MoETransformerLanguageModelConfig
from fairseq_moe.stock.seam import SEAMS

__all__ = ["flags_table", "own_flags_table", "seams_table"]


def seams_table() -> str:
    """One row per seam: what stock does, why that breaks, what happens instead, and the test."""
    rows = [
        (f"`{seam.target}`", seam.stock_does, seam.breaks, seam.we_do, f"`{seam.test}`")
        for seam in sorted(SEAMS, key=lambda seam: seam.target)
    ]
    return _table(("seam", "stock", "why it breaks", "here", "test"), rows)


def own_flags_table() -> str:
    """One row per flag that the plugin adds: its default and help."""
    stock = {field.name for field in fields(TransformerLanguageModelConfig)} | {"sentence_avg"}
    added = [
        field
        for config in (MoETransformerLanguageModelConfig, MoECrossEntropyCriterionConfig)
        for field in fields(config)
        if field.name not in stock and "help" in field.metadata  # the others stand for flags of other groups
    ]
    rows = [
        (f"`--{field.name.replace('_', '-')}`", f"{field.default}", field.metadata["help"]) for field in added
    ]
    return _table(("flag", "default", "meaning"), rows)


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
