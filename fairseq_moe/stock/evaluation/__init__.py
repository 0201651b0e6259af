"""Which text does an evaluation score, which prompts does a generation answer, and what is printed about it?

Tests: tests/e2e/test_evaluation_length.py, tests/e2e/test_prompts.py, tests/e2e/test_commands.py,
tests/numerics/test_branch_eval.py.
"""

from fairseq_moe.stock.evaluation import commands, lengths, loading, scoring  # noqa: F401  (declare their seams)
