"""How is an optimizer's step made cheaper? Adam with half-precision state, and Adam on CPU block by block.

Tests: tests/unit/optim.
"""

from fairseq_moe.optim.half_adam import HalfAdam

__all__ = ["HalfAdam"]
