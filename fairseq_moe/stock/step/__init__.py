"""What is different in a training step of stock's trainer?"""

from fairseq_moe.stock.step import expert_load, gradients, stopping, training  # noqa: F401  (declare their seams)
