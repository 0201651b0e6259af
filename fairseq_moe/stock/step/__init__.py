"""What is different in a training step of stock's trainer?

Tests: tests/distributed/test_training_equality.py, tests/distributed/test_uneven_batches.py; data_axis:
tests/distributed/test_data_axis.py; gradients:
tests/distributed/test_grad_norm.py; guard: tests/reliability/test_r11_non_finite.py; loss_spikes:
tests/reliability/test_r12_loss_spikes.py; expert_load: tests/reliability/test_r14_one_expert_takes_all.py; profiling:
tests/e2e/test_profiling.py; signals,
stopping: tests/reliability/test_r20_signals.py; lock: tests/reliability/test_r25_lock.py.
"""

from fairseq_moe.stock.step import (  # noqa: F401  (declare their seams)
    data_axis,
    expert_load,
    gradients,
    stopping,
    training,
)
