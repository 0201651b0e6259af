"""How does a command start, and how does it end when something is wrong?

Tests: tests/e2e/test_launch.py, tests/e2e/test_bad_input.py; spawned: tests/reliability/test_spawned_ranks.py.
"""

from fairseq_moe.stock.start import ending, launch, objects, parsing, text  # noqa: F401  (declare their seams)
