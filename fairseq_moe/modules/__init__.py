"""How does a token pass a mixture-of-experts layer? Routing, dispatch, the experts' networks, combination.

``moe_layer`` composes them. ``routing``, ``dispatch`` and ``kernels`` are folders with legends of their own, ``blocks``
holds the rest of a decoder layer, and ``reference`` says the same in thirty slow lines.

Letters at the end of a name give its shape; a number is an axis of that size:

====== ==========================================================
letter meaning
====== ==========================================================
T      tokens of this rank (batch x sequence, batch-major)
D      model width
F      hidden width of an expert
E      experts of the layer, on all ranks
L      experts on this rank
K      experts chosen per token
S      source of the experts' rows: tokens, or rows that other ranks sent
====== ==========================================================

A padding mask is True where a token is padding, as in fairseq. Nothing here knows fairseq or
torch.distributed.

Tests: tests/unit/modules, tests/numerics/test_layer_against_reference.py, tests/distributed/test_recompute.py.
"""

from fairseq_moe.modules.dispatch.alltoall import AllToAllDispatcher
from fairseq_moe.modules.dispatch.dispatcher import Dispatcher, LocalDispatcher
from fairseq_moe.modules.experts import Experts
from fairseq_moe.modules.moe_layer import MoEAux, MoELayer
from fairseq_moe.modules.routing.contract import LOSSES, RoutingDecision, TokenInfo
from fairseq_moe.modules.routing.losses import balance_loss
from fairseq_moe.modules.routing.router import BranchConfig, Router, RouterMode, ScorerConfig
from fairseq_moe.modules.routing.topk import TopKConfig
from fairseq_moe.modules.shared_experts import SharedExperts
from fairseq_moe.modules.whole_aux import whole_auxes

__all__ = [
    "LOSSES",
    "AllToAllDispatcher",
    "BranchConfig",
    "Dispatcher",
    "Experts",
    "LocalDispatcher",
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
    "whole_auxes",
]
