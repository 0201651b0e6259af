"""How do wrappers that shard or replicate parameters treat experts?

Tests: tests/distributed/test_fsdp.py, tests/distributed/test_precision.py,
tests/distributed/test_sharded_states.py, tests/distributed/test_training_equality.py.
"""

from fairseq_moe.stock.sharding import fsdp, sharded_state, wrappers  # noqa: F401  (declare seams and states)
