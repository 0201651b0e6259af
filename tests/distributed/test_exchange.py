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
    assert mesh.dense is not None
    assert mesh.sparse is not None
    assert mesh.dense.mesh.flatten().tolist() == mesh.sparse.mesh.flatten().tolist()
    exchange_ranks = dist.get_process_group_ranks(mesh.sparse.get_group("expert"))
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
def test_process_groups_are_the_rows_and_columns_of_the_mesh(
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


def test_exchange_without_any_row_is_legal() -> None:
    assert run_ranks(_exchange_rows, 2, [[0, 0], [0, 0]]) == [([], []), ([], [])]


def _forward_and_backward(rank: int, flags: list[Any]) -> tuple[list[dict[str, Any]], list[float]]:
    """The calls of one forward and backward pass of one MoE layer, and the rows kept of each expert."""
    from fairseq_moe.stock.find_experts import moe_decoder
    from tests.helpers.tiny import build_trainer, make_batch

    model = build_trainer(flags).get_model()
    decoder = moe_decoder(model)
    assert decoder is not None
    calls = _record_calls()
    logits, extra = model(**make_batch(rank, num_sequences=1 + rank)["net_input"])
    logits.sum().backward()
    return calls, extra["moe_aux"][1].load_2E[1].tolist()


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
