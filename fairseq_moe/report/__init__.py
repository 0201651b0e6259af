"""How did a run go, or how does it go? One HTML page from what training has written.

Tests: tests/unit/report; of a real run: tests/e2e/test_report.py.
"""

from fairseq_moe.report.writing import write_report

__all__ = ["write_report"]
