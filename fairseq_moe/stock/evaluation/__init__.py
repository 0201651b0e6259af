"""Which text does an evaluation score, which prompts does a generation answer, and what is printed about it?"""

from fairseq_moe.stock.evaluation import commands, lengths, loading, scoring  # noqa: F401  (declare their seams)
