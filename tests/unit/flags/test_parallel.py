"""Over how many ranks the flags spread experts, widths and sequences: Megatron's rules, and what is left to us."""

from typing import Any

import pytest

from fairseq_moe.flags.moe import MoEConfig
from fairseq_moe.flags.parallel import Axes
from fairseq_moe.modules import TopKConfig

EXPERTS = {"num_experts": 8}
BRANCH = {"moe_freq": 2, "moe_expert_count": 8}
T2, C2 = {"tensor_model_parallel_size": 2}, {"context_parallel_size": 2}
P2 = {"pipeline_model_parallel_size": 2}
E4, X2 = {"expert_model_parallel_size": 4}, {"expert_tensor_parallel_size": 2}
EXTENDED_TP, EXTENDED_EP = {"moe_extended_tp": True}, {"moe_extended_ep": True}


@pytest.mark.parametrize("experts", [EXPERTS, BRANCH], ids=["megatron", "branch"])
@pytest.mark.parametrize(
    ("given", "axes"),
    [
        ({}, Axes()),
        ({"tensor_model_parallel_size": 1, "context_parallel_size": 1}, Axes()),
        (E4, Axes(ep_size=4)),
        (E4 | X2, Axes(ep_size=4, expert_tensor=2)),
        (C2 | E4 | X2, Axes(ep_size=4, expert_tensor=2, context=2)),
        (T2 | X2, Axes(expert_tensor=2, tensor=2)),
        (T2 | E4 | {"expert_tensor_parallel_size": 1}, Axes(ep_size=4, tensor=2)),
        (T2 | E4 | EXTENDED_TP, Axes(ep_size=1, expert_tensor=8, tensor=2)),
        (T2 | EXTENDED_TP, Axes(ep_size=1, expert_tensor=2, tensor=2)),
        (T2 | C2 | E4 | EXTENDED_TP, Axes(ep_size=1, expert_tensor=8, tensor=2, context=2)),
        (T2 | E4 | EXTENDED_EP, Axes(ep_size=8, tensor=2)),
        (T2 | EXTENDED_EP, Axes(tensor=2)),
        (E4 | EXTENDED_TP, Axes(ep_size=1, expert_tensor=4)),
        # Nothing is extended: as without.
        (EXTENDED_TP, Axes()),
        (EXTENDED_EP, Axes()),
        (E4 | EXTENDED_EP, Axes(ep_size=4)),
        # Stages have experts of their own.
        (P2, Axes(pipe=2)),
        (P2 | E4 | X2, Axes(ep_size=4, expert_tensor=2, pipe=2)),
        (P2 | T2 | C2 | E4 | EXTENDED_EP, Axes(ep_size=8, tensor=2, context=2, pipe=2)),
    ],
    ids=str,
)
def test_axes(given: dict[str, Any], axes: Axes, experts: dict[str, Any]) -> None:
    assert MoEConfig.from_args(experts | given).axes == axes
    assert MoEConfig.from_args(experts | given).axes == axes


@pytest.mark.parametrize(("experts", "parts"), [(EXPERTS, 4), (BRANCH, 1)], ids=["megatron", "branch"])
def test_experts_are_divided_as_all_widths_are_in_megatron(experts: dict[str, Any], parts: int) -> None:
    axes = MoEConfig.from_args(experts | E4 | {"tensor_model_parallel_size": 4}).axes
    assert axes == Axes(ep_size=4, expert_tensor=parts, tensor=4)


@pytest.mark.parametrize(
    ("given", "tokens"),
    [({}, 3 * 17), (T2, 3 * 9), (C2, 3 * 10), (T2 | C2, 3 * 6), ({"context_parallel_size": 4}, 3 * 6)],
    ids=str,
)
def test_a_rank_has_its_part_of_the_largest_batch(given: dict[str, Any], tokens: int) -> None:
    """Sequences of 17 are continued to a multiple of 2CT: 18 (T 2), 20 (C 2), 24 (both; C 4)."""
    moe = MoEConfig.from_args({**EXPERTS, "batch_size": 3, "tokens_per_sample": 16, **given})
    rule = moe.router_config()
    assert isinstance(rule, TopKConfig)
    assert rule.capacity.max_tokens == tokens
