"""How do ranks talk to one another? Process groups, the expert exchange, a few agreed reductions, the watchdog.

Nothing outside this folder uses torch.distributed.

Tests: tests/distributed/test_exchange.py; collectives: all tests of several ranks; sharding:
tests/distributed/test_fsdp.py; watchdog: tests/unit/distributed, tests/reliability/test_r22_lost_rank.py.
"""

from fairseq_moe.distributed.all_to_all import GroupExchange
from fairseq_moe.distributed.collectives import (
    agree,
    all_reduce_sum,
    barrier,
    broadcast_value,
    gather_values,
    set_collective_timeout,
)
from fairseq_moe.distributed.leaving import leave_together
from fairseq_moe.distributed.mesh import (
    ParallelMesh,
    local_experts_only,
    parallel_mesh,
    rank,
    world_size,
)
from fairseq_moe.distributed.watchdog import PEER_LOST_EXIT_CODE, Watchdog, is_collective_failure

__all__ = [
    "PEER_LOST_EXIT_CODE",
    "GroupExchange",
    "ParallelMesh",
    "Watchdog",
    "agree",
    "all_reduce_sum",
    "barrier",
    "broadcast_value",
    "gather_values",
    "is_collective_failure",
    "leave_together",
    "local_experts_only",
    "parallel_mesh",
    "rank",
    "set_collective_timeout",
    "world_size",
]
