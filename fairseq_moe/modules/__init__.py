"""The mixture-of-experts layer, from pure functions up to a Module.

Letters at the end of a name give its shape:

====== ==========================================================
letter meaning
====== ==========================================================
T      tokens of this rank (batch x sequence, batch-major)
D      model width
F      hidden width of an expert
E      experts of the layer, on all ranks
L      experts on this rank
K      experts chosen per token
G      ranks that exchange tokens
R      rows: (token, choice) pairs that survived capacity
S      what experts read rows from: tokens, or rows that other ranks sent
====== ==========================================================

A padding mask is True where a token is padding, as in fairseq. Nothing here knows fairseq or
torch.distributed.

Tests: tests/unit/modules, tests/numerics/test_layer_against_reference.py, tests/distributed/test_recompute.py.
"""

from fairseq_moe.modules.dispatch.alltoall import Dispatcher, DispatchRecord
from fairseq_moe.modules.experts import Experts
from fairseq_moe.modules.moe_layer import MoEAux, MoELayer
from fairseq_moe.modules.routing.contract import LOSSES, RoutingDecision, TokenInfo
from fairseq_moe.modules.routing.losses import balance_loss
from fairseq_moe.modules.routing.router import BranchConfig, Router, RouterMode, ScorerConfig
from fairseq_moe.modules.routing.topk import TopKConfig
from fairseq_moe.modules.shared_experts import SharedExperts

__all__ = [
    "LOSSES",
    "BranchConfig",
    "DispatchRecord",
    "Dispatcher",
    "Experts",
    "MoEAux",
    "MoELayer",
    "Router",
    "RouterMode",
    "RoutingDecision",
    "ScorerConfig",
    "SharedExperts",
    "TokenInfo",
    "TopKConfig",
    "balance_loss",
]
