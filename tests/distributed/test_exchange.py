"""What goes between the ranks of an MoE layer: how much, where to, and its gradient.

Run with ``pytest tests/distributed/test_exchange.py``.
"""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fairseq_moe.parallel.placement import DENSE, EXPERT, placement_of
from tests.helpers.ranks import run_ranks


def _record_calls() -> list[dict[str, Any]]:
    """Note every all-to-all of this rank from now on."""
    from fairseq_moe.distributed import all_to_all as exchange

    calls: list[dict[str, Any]] = []
    real = dist.all_to_all_single

    def all_to_all_single(output: Any, input: Any, recv: Any = None, send: Any = None, **kwargs: Any) -> Any:
        calls.append({"bytes": input.numel() * input.element_size(), "dtype": input.dtype, "send": send})
        return real(output, input, recv, send, **kwargs)

    exchange.dist.all_to_all_single = all_to_all_single
    return calls


def _mesh_ranks(rank: int, num_experts: int) -> tuple[list[int], list[int]]:
    from fairseq_moe.distributed import parallel_mesh

    mesh = parallel_mesh(num_experts)
    assert parallel_mesh(num_experts) is mesh
    exchange_ranks = dist.get_process_group_ranks(mesh.groups_by_axes["expert", "expert_tensor"])
    assert dist.get_process_group_ranks(mesh.group_of_copies(DENSE)) == list(range(dist.get_world_size()))
    replica_ranks = dist.get_process_group_ranks(mesh.group_of_copies(EXPERT))
    return exchange_ranks, replica_ranks


@pytest.mark.parametrize(
    ("num_experts", "exchange_ranks", "replica_ranks"),
    [
        (8, [[0, 1, 2, 3]] * 4, [[0], [1], [2], [3]]),
        (2, [[0, 1], [0, 1], [2, 3], [2, 3]], [[0, 2], [1, 3], [0, 2], [1, 3]]),
    ],
)
def test_process_groups_are_those_of_the_axes(
    num_experts: int, exchange_ranks: list[list[int]], replica_ranks: list[list[int]]
) -> None:
    by_rank = run_ranks(_mesh_ranks, 4, num_experts)
    assert by_rank == list(zip(exchange_ranks, replica_ranks, strict=True))


def _exchange_rows(rank: int, send_table: list[list[int]]) -> tuple[list[float], list[float]]:
    """Row values name (source rank, position); the gradient of a row is ten times what the receiver got."""
    from fairseq_moe.distributed import parallel_mesh

    send, recv = send_table[rank], [row[rank] for row in send_table]
    rows = torch.tensor([[100.0 * rank + i] for i in range(sum(send))]).reshape(-1, 1).requires_grad_()
    received = parallel_mesh(len(send_table)).exchange().send(rows, send, recv).arrive()
    (5 * received.square()).sum().backward()
    assert rows.grad is not None
    return received.flatten().tolist(), rows.grad.flatten().tolist()


def test_rows_arrive_in_rank_order_and_their_gradients_come_home() -> None:
    # rank 0 sends nothing to itself, rank 2 sends nothing at all and nobody sends to rank 1 but rank 0
    by_rank = run_ranks(_exchange_rows, 3, [[0, 2, 1], [1, 0, 0], [0, 0, 0]])
    assert [received for received, _ in by_rank] == [[100.0], [0.0, 1.0], [2.0]]
    assert [gradient for _, gradient in by_rank] == [[0.0, 10.0, 20.0], [1000.0], []]


def _gather_and_add(rank: int, lengths: int) -> tuple[Any, ...]:
    """Rows name their rank; what rank r does with a row that it got is to multiply it by r + 1."""
    from fairseq_moe.distributed import parallel_mesh

    exchange = parallel_mesh(3).exchange()
    rows = torch.full((lengths, 1), 10.0**rank).requires_grad_()
    gathered = exchange.gather(rows).arrive()
    added = exchange.scatter_sum((rank + 1) * gathered).arrive()
    (added * torch.arange(1, lengths + 1).unsqueeze(1)).sum().backward()
    assert rows.grad is not None
    return gathered.flatten().tolist(), added.flatten().tolist(), rows.grad.flatten().tolist()


def test_gathered_rows_are_those_of_all_ranks_and_sums_come_home() -> None:
    for rank, (gathered, added, gradient) in enumerate(run_ranks(_gather_and_add, 3, 2)):
        assert gathered == [1.0, 1.0, 10.0, 10.0, 100.0, 100.0]
        assert added == [6.0 * 10.0**rank] * 2
        assert gradient == [6.0, 12.0]
    assert run_ranks(_gather_and_add, 3, 0) == [([], [], [])] * 3


def _gather_calls(rank: int, flags: list[Any]) -> list[tuple[str, int, int]]:
    """Name, bytes sent and bytes received of each exchange of a forward and backward pass of one MoE layer."""
    from fairseq_moe.distributed import all_to_all as exchange
    from tests.helpers.tiny import build_trainer, make_batch

    model = build_trainer(flags).get_model()
    calls: list[tuple[str, int, int]] = []
    for name in ("all_gather_single", "reduce_scatter_single"):
        real = getattr(exchange, name)

        def noted(output: Any, rows: Any, *, name: str = name, real: Any = real, **kwargs: Any) -> Any:
            calls.append((name.removesuffix("_single"), rows.nbytes, output.nbytes))
            return real(output, rows, **kwargs)

        setattr(exchange, name, noted)
    logits, _ = model(**make_batch(rank, num_sequences=1 + rank)["net_input"])
    logits.sum().backward()
    return calls


def _drop_outputs(rank: int, dropout: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One expert in two halves, one choice of weight 1: outputs with dropout, and without."""
    from fairseq_moe.distributed import parallel_mesh
    from fairseq_moe.modules import AllToAllDispatcher
    from fairseq_moe.modules.routing.contract import RoutingDecision

    exchange = parallel_mesh(1, 1, 2).exchange()
    x_TD = torch.rand(50, 4, generator=torch.Generator().manual_seed(rank)) + 0.5
    ids_TK, kept_TK = torch.zeros(50, 1, dtype=torch.int64), torch.ones(50, 1, dtype=torch.bool)
    decision = RoutingDecision.counted(
        expert_ids_TK=ids_TK, requested_TK=kept_TK, kept_TK=kept_TK, num_experts=1, capacity=None
    )
    found = []
    for probability in (dropout, 0.0):
        dispatched = AllToAllDispatcher(exchange, parts=2).send(x_TD, decision, torch.ones(50, 1))
        rows_SD, work = dispatched.arrive()
        assert list(work.host_counts()) == [100]  # of both ranks, on both
        found.append(dispatched.combine((rank + 1) * rows_SD, dropout=probability))
    torch.testing.assert_close(found[1], 3 * x_TD)  # both halves added up
    return found[0], found[1]


def test_outputs_are_dropped_once_the_parts_of_an_expert_have_added_up() -> None:
    for dropped, whole in run_ranks(_drop_outputs, 2, 0.5):
        is_kept = dropped != 0
        assert 0.3 < is_kept.float().mean() < 0.7
        torch.testing.assert_close(dropped[is_kept], 2 * whole[is_kept])


def test_the_allgather_dispatcher_sends_each_token_once() -> None:
    flags = [
        *("--moe-freq", 0, "--moe-expert-count", 0, "--num-experts", 4, "--moe-layer-freq", "[0,1]"),
        *("--moe-router-topk", 2, "--moe-token-dispatcher-type", "allgather", "--moe-gate-loss-wt", 1),
    ]
    longest, width, top_k = 16, 8, 2  # rank 0 has 8 tokens, rank 1 has 16
    tokens, ids, weights = 4 * longest * width, 8 * longest * top_k, 4 * longest * top_k
    for calls in run_ranks(_gather_calls, 2, flags):
        assert calls == [
            ("all_gather", tokens, 2 * tokens),
            ("all_gather", ids, 2 * ids),
            ("all_gather", weights, 2 * weights),
            ("reduce_scatter", 2 * tokens, tokens),
            ("all_gather", tokens, 2 * tokens),
            ("reduce_scatter", 2 * weights, weights),
            ("reduce_scatter", 2 * tokens, tokens),
        ]


def test_exchange_without_any_row_is_legal() -> None:
    assert run_ranks(_exchange_rows, 2, [[0, 0], [0, 0]]) == [([], []), ([], [])]


def _forward_and_backward(rank: int, flags: list[Any]) -> tuple[list[dict[str, Any]], list[float]]:
    """The calls of one forward and backward pass of one MoE layer, and the rows kept of each expert."""
    from fairseq_moe.stock.find_experts import moe_decoder
    from tests.helpers.layer_stats import load_of
    from tests.helpers.tiny import build_trainer, make_batch

    model = build_trainer(flags).get_model()
    decoder = moe_decoder(model)
    assert decoder is not None
    calls = _record_calls()
    logits, extra = model(**make_batch(rank, num_sequences=1 + rank)["net_input"])
    logits.sum().backward()
    return calls, load_of(extra["moe_aux"][1])[1].tolist()


def test_only_surviving_rows_travel_and_only_to_their_experts_rank() -> None:
    width, experts_per_rank = 8, 2
    for calls, kept_E in run_ranks(_forward_and_backward, 2, ["--moe-expert-count", 4]):
        per_rank = [sum(kept_E[:experts_per_rank]), sum(kept_E[experts_per_rank:])]
        counts, rows, outputs, *gradients = calls
        assert counts["dtype"] == torch.int64
        assert counts["bytes"] == 8 * 4  # one number per expert
        assert rows["send"] == per_rank
        assert rows["bytes"] == sum(kept_E) * width * 4
        # Back go the results, and the gradients go both ways once more: four exchanges of rows in all.
        assert outputs["bytes"] == gradients[1]["bytes"]
        assert gradients[0]["bytes"] == rows["bytes"]
        assert len(calls) == 5


def test_ranks_that_share_no_experts_exchange_nothing() -> None:
    flags = ["--moe-expert-count", 1, "--moe-top1-expert"]
    assert [calls for calls, _ in run_ranks(_forward_and_backward, 2, flags)] == [[], []]


def test_dummy_a2a_leaves_every_exchange_out() -> None:
    assert [calls for calls, _ in run_ranks(_forward_and_backward, 2, ["--dummy-a2a"])] == [[], []]


def _times(rank: int, flags: list[Any]) -> tuple[float, float]:
    from tests.helpers.tiny import build_trainer, make_batch, update

    logged = update(build_trainer(flags), [make_batch(rank)])
    return logged["all_to_all_cpu_time_ms"], logged["all_to_all_cuda_time_ms"]


def test_exchange_times_are_logged_when_asked_for() -> None:
    for cpu_ms, cuda_ms in run_ranks(_times, 2, ["--record-a2a-perf-stats"]):
        assert 0 < cpu_ms < 10_000
        assert cuda_ms == 0
    assert run_ranks(_times, 2, []) == [(0.0, 0.0), (0.0, 0.0)]


def _copy_model(rank: int) -> None:
    from tests.helpers.tiny import build_trainer, make_batch

    model = build_trainer(["--moe-expert-count", 2]).get_model()
    twin = copy.deepcopy(model)
    batch = make_batch(rank)["net_input"]
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert one is not other
        assert placement_of(one) == placement_of(other)
        assert hasattr(one, "expert") == hasattr(other, "expert")
    assert twin.decoder.mesh is model.decoder.mesh
    outputs = []
    for each in (model, twin):
        logits, _ = each(**batch)
        logits.square().sum().backward()
        outputs.append(logits)
    assert torch.equal(*outputs)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_copy_of_a_model_has_its_own_weights_and_the_same_ranks() -> None:
    run_ranks(_copy_model, 4)


def _order_of_work(rank: int) -> list[str]:
    from fairseq_moe.distributed import GroupExchange
    from fairseq_moe.distributed import all_to_all as exchange

    order: list[str] = []

    def noted(name: str, call: Any) -> Any:
        def run(*args: Any) -> Any:
            order.append(name)
            return call(*args)

        return run

    exchange._Flight.start = noted("start", exchange._Flight.start)  # type: ignore[method-assign]
    exchange._Flight.arrive = noted("arrive", exchange._Flight.arrive)  # type: ignore[method-assign]
    x = torch.ones(2, 1, requires_grad=True)
    transfer = GroupExchange(dist.group.WORLD).send(x, [1, 1], [1, 1])
    order.append("work")
    other = x * 2
    other.register_hook(lambda grad: order.append("work"))
    rows = transfer.arrive()
    order.append("backward")
    (rows * (rank + 1) + other).sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [3, 4]  # row g came back from rank g, and the work added 2
    return order


def test_other_work_runs_while_rows_travel_forward_and_backward() -> None:
    for order in run_ranks(_order_of_work, 2):
        assert order == ["start", "work", "arrive", "backward", "start", "work", "arrive"]
