"""Rows: taken out of the tokens expert by expert, and added back by weight."""

import torch

from fairseq_moe.modules.dispatch.rows import (
    RowPlan,
    combine_rows,
    plan_rows,
    take_rows,
    take_weights,
)
from fairseq_moe.modules.routing.contract import RoutingDecision

# token   0      1      2            rows        t0 t1 | t1 | t0 t2
# choice  2, 0   0, 1   2, -         experts      0  0 |  1 |  2  2
IDS = torch.tensor([[2, 0], [0, 1], [2, 1]])
KEPT = torch.tensor([[True, True], [True, True], [True, False]])


def decision_of(ids_TK: torch.Tensor, kept_TK: torch.Tensor, num_experts: int) -> RoutingDecision:
    return RoutingDecision.counted(
        expert_ids_TK=ids_TK, requested_TK=kept_TK, kept_TK=kept_TK, num_experts=num_experts, capacity=None
    )


def plan_of(ids_TK: torch.Tensor, kept_TK: torch.Tensor, num_experts: int) -> tuple[list[int], RowPlan]:
    decision = decision_of(ids_TK, kept_TK, num_experts)
    counts = decision.counts.kept_E.tolist()
    return counts, plan_rows(decision).first(sum(counts))


def test_rows_are_sorted_by_expert_then_token() -> None:
    counts, plan = plan_of(IDS, KEPT, num_experts=4)
    assert counts == [2, 1, 2, 0]
    assert plan.token_R.tolist() == [0, 1, 1, 0, 2]
    assert plan.assignment_R.tolist() == [1, 2, 3, 0, 4]


def test_taken_and_combined_by_hand() -> None:
    x_TD = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    weights_TK = torch.tensor([[0.5, 0.25], [2.0, 4.0], [1.0, 100.0]])
    _, plan = plan_of(IDS, KEPT, num_experts=3)
    rows = take_rows(x_TD, plan)
    assert rows[:, 0].tolist() == [1, 2, 2, 1, 3]
    out = combine_rows(rows, take_weights(weights_TK, plan), plan)
    assert out.tolist() == [[0.75, 7.5], [12.0, 120.0], [3.0, 30.0]]


def test_a_token_without_rows_gets_zero_and_zero_gradient() -> None:
    kept = torch.tensor([[False, False], [True, True], [True, True]])
    _, plan = plan_of(IDS, kept, num_experts=3)
    x_TD = torch.randn(3, 2, requires_grad=True)
    weights_TK = torch.rand(3, 2, requires_grad=True)
    out = combine_rows(take_rows(x_TD, plan), take_weights(weights_TK, plan), plan)
    out.sum().backward()
    assert out[0].tolist() == [0, 0]
    assert x_TD.grad is not None and x_TD.grad[0].tolist() == [0, 0]
    assert weights_TK.grad is not None and weights_TK.grad[0].tolist() == [0, 0]


def test_nothing_kept_and_no_tokens() -> None:
    for num_tokens in (3, 0):
        ids = torch.zeros(num_tokens, 2, dtype=torch.int64)
        counts, plan = plan_of(ids, torch.zeros_like(ids, dtype=torch.bool), num_experts=3)
        assert counts == [0, 0, 0]
        rows = take_rows(torch.randn(num_tokens, 4), plan)
        assert rows.shape == (0, 4)
        assert torch.equal(combine_rows(rows, torch.rand(0), plan), torch.zeros(num_tokens, 4))


def test_a_nan_row_touches_its_own_token_only() -> None:
    _, plan = plan_of(IDS, KEPT, num_experts=3)
    y_RD = torch.ones(5, 2)
    y_RD[2] = float("nan")  # token 1 at expert 1
    out = combine_rows(y_RD, torch.ones(5), plan)
    assert out.isnan().any(-1).tolist() == [False, True, False]
