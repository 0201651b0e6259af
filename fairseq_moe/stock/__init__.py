"""The adapter: the one place where stock fairseq (and fairscale on CPU) is changed.

Each change is a ``seam`` in one of these modules; ``install`` puts them all in place. Dense models keep
stock's behaviour to the bit: every seam that concerns experts asks first whether the model has any.
"""

from fairseq_moe.stock import (  # noqa: F401  (declare their seams)
    communication,
    dictionary,
    evaluate,
    failing,
    fsdp,
    gradients,
    launch,
    load_warning,
    loading,
    optim,
    parsing,
    retention,
    saving,
    stopping,
    training,
    untrusted,
    wrappers,
)
from fairseq_moe.stock.seam import SEAMS, Seam, install_seams

__all__ = ["SEAMS", "Seam", "install"]


def install() -> None:
    """Install every seam; safe to call again."""
    install_seams()
