"""Where and why is stock fairseq (and fairscale on CPU) changed? Here alone: this is the adapter.

Each change is a ``seam`` in one of these modules; ``install`` puts them all in place. Dense models keep
stock's behaviour to the bit: every seam that concerns experts asks first whether the model has any.

Folders import one way: ``run`` (what is remembered of a run) < ``start`` < ``checkpoint`` < ``sharding`` < ``step``
< ``evaluation``.

Tests: tests/unit/stock, and the one that each seam names; evaluation: tests/e2e/test_commands.py; dictionary:
tests/unit/data; optim: tests/unit/optim.
"""

from fairseq_moe.distributed import rank
from fairseq_moe.faults import ask_rank
from fairseq_moe.stock import checkpoint, dictionary, evaluation, optim, sharding, start, step  # noqa: F401
from fairseq_moe.stock.seam import SEAMS, Seam, install_seams

__all__ = ["SEAMS", "Seam", "install"]


def install() -> None:
    """Install every seam; safe to call again."""
    ask_rank(rank)
    install_seams()
