"""Exchanges without process groups: what is left as it is, and what is measured; with groups: tests/distributed."""

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.modules import (
    AllToAllDispatcher,
    Experts,
    MoELayer,
    Router,
    RouterMode,
    SharedExperts,
    TokenInfo,
    TopKConfig,
)
from fairseq_moe.modules.dispatch.exchange import (
    Arrived,
    LocalExchange,
    NoExchange,
    TimedExchange,
    Transfer,
)
from fairseq_moe.modules.routing.scores import ScoreRule
from tests.helpers.layer_stats import named_stats_of

COUNTS = torch.tensor([[1, 2], [0, 3]])
ROWS = torch.arange(12.0).view(6, 2)


class SlowExchange(NoExchange):
    """Needs at least 2 ms for rows, and 20 ms for counts."""

    def counts(self, send_counts_GL: Tensor) -> Tensor:
        time.sleep(0.02)
        return super().counts(send_counts_GL) + 1

    def send(self, rows_RD: Tensor, send_splits: list[int], recv_splits: list[int]) -> Transfer:
        time.sleep(0.001)
        return SlowTransfer(rows_RD * 2)


class SlowTransfer(Arrived):
    def arrive(self) -> Tensor:
        time.sleep(0.001)
        return super().arrive()


@pytest.mark.parametrize("exchange", [LocalExchange(), NoExchange(2)])
def test_without_an_exchange_counts_and_rows_are_returned_as_they_are(exchange: LocalExchange) -> None:
    assert exchange.counts(COUNTS) is COUNTS
    assert exchange.send(ROWS, [3, 3], [3, 3]).arrive() is ROWS
    assert (LocalExchange().size, NoExchange(2).size) == (1, 2)


class TestTimedExchange:
    def test_returns_what_the_inner_one_returns(self) -> None:
        timed = TimedExchange(SlowExchange(2))
        assert timed.size == 2
        assert timed.counts(COUNTS).tolist() == (COUNTS + 1).tolist()
        assert torch.equal(timed.send(ROWS, [3, 3], [3, 3]).arrive(), 2 * ROWS)

    def test_adds_up_the_exchanges_of_rows_and_not_of_counts(self) -> None:
        timed = TimedExchange(SlowExchange(2))
        timed.counts(COUNTS)
        assert timed.times.cpu_ms == 0
        timed.send(ROWS, [3, 3], [3, 3])
        once = timed.times.cpu_ms
        assert once >= 2
        timed.send(ROWS, [3, 3], [3, 3])
        assert timed.times.cpu_ms >= once + 2
        assert timed.times.cuda_ms == 0
        timed.times.reset()
        assert (timed.times.cpu_ms, timed.times.cuda_ms) == (0, 0)

    def test_leaves_out_what_is_computed_before_the_rows_are_asked_for(self) -> None:
        timed = TimedExchange(NoExchange(2))
        transfer = timed.send(ROWS, [3, 3], [3, 3])
        time.sleep(0.05)
        transfer.arrive()
        assert 0 < timed.times.cpu_ms < 50


def layer_of(exchange: SlowExchange | TimedExchange, **options: object) -> MoELayer:
    """Two ranks' layer of four experts, of which this one holds two."""
    torch.manual_seed(0)
    return MoELayer(
        router=Router(model_dim=8, num_experts=4, config=TopKConfig(score=ScoreRule(top_k=2))),
        experts=Experts(num_local_experts=2, first_expert_id=0, model_dim=8, hidden_dim=8, activation=F.relu),
        dispatcher=AllToAllDispatcher(exchange),
        **options,  # type: ignore[arg-type]
    )


def test_a_layer_logs_the_times_of_this_pass_alone() -> None:
    timed = TimedExchange(NoExchange(2))
    layer = layer_of(timed, exchange_times=timed.times)
    timed.times.cpu_ms = 1e6  # left over from a pass that did not end
    _, aux = layer(torch.randn(5, 8), tokens=TokenInfo(mode=RouterMode.TRAIN))
    assert 0 < named_stats_of(aux)["all_to_all_cpu_time_ms"] < 1e5


def test_a_layer_that_is_not_timed_logs_zero() -> None:
    _, aux = layer_of(NoExchange(2))(torch.randn(5, 8), tokens=TokenInfo(mode=RouterMode.TRAIN))
    assert named_stats_of(aux)["all_to_all_cpu_time_ms"] == 0


def test_without_an_exchange_a_rank_applies_its_own_experts_to_all_of_its_rows() -> None:
    """Rows for expert e of the other rank go to expert e of this one."""
    layer, x_TD = layer_of(NoExchange(2)), torch.randn(5, 8)
    y_TD, _ = layer(x_TD, tokens=TokenInfo(mode=RouterMode.TRAIN))
    routed = layer.router(x_TD, tokens=TokenInfo(mode=RouterMode.TRAIN))
    experts = layer.experts
    for token in range(5):
        expected = torch.zeros(8)
        for expert, weight in zip(
            routed.decision.expert_ids_TK[token] % 2, routed.weights_TK[token], strict=True
        ):
            hidden = F.relu(F.linear(x_TD[token], experts.fc1_weight[expert], experts.fc1_bias[expert]))
            expected += weight * F.linear(hidden, experts.fc2_weight[expert], experts.fc2_bias[expert])
        torch.testing.assert_close(y_TD[token], expected)


def test_shared_experts_work_while_rows_travel() -> None:
    order: list[str] = []

    class Noting(NoExchange):
        def send(self, rows_RD: Tensor, send_splits: list[int], recv_splits: list[int]) -> Transfer:
            order.append("send")
            return NotingTransfer(rows_RD)

    class NotingTransfer(Arrived):
        def arrive(self) -> Tensor:
            order.append("arrive")
            return super().arrive()

    shared = SharedExperts(model_dim=8, hidden_dim=8, activation=F.relu)
    layer = layer_of(Noting(2), shared_experts=shared)
    shared.register_forward_hook(lambda *args: order.append("shared experts"))
    layer.experts.register_forward_hook(lambda *args: order.append("experts"))
    layer(torch.randn(5, 8), tokens=TokenInfo(mode=RouterMode.TRAIN))
    assert order == ["send", "shared experts", "arrive", "experts", "send", "arrive"]
