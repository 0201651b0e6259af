"""Optimizers."""

from fairseq_moe.optim.half_adam import HalfAdam

__all__ = ["HalfAdam"]
