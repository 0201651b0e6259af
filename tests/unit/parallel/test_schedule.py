"""Orders of pipeline steps for all P <= 8, V <= 4, m <= 16: torch's orders, rendezvous, activations, idle time."""

from fractions import Fraction
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from torch.distributed.pipelining import schedules as torchs

from fairseq_moe.parallel.schedule import (
    Action,
    Recv,
    Send,
    Step,
    actions,
    bubble_frac,
    forward_actions,
    lowered,
    lowered_forward,
    peak_activations,
    with_dummies,
)
from tests.helpers.rendezvous import makespan, stuck

# P, V, m
SIZES = [(pipe, 1, m) for pipe in range(1, 9) for m in range(1, 17)]
SIZES += [(pipe, virtual, m) for pipe in range(2, 9) for virtual in (2, 3, 4) for m in range(pipe, 17, pipe)]
UNIT_COST = {"F": 1.0, "B": 2.0}

lists_of = cache(lowered)


def message(step: Step) -> tuple[str, int, int]:
    """What a transfer carries, or a pass needs or makes, on its rank."""
    return step.kind, step.micro_batch, step.chunk


def test_one_forward_one_backward_on_two_ranks() -> None:
    assert _short(actions(2, 1, 3, rank=0)) == "F0 F1 B0 F2 B1 B2"
    assert _short(actions(2, 1, 3, rank=1)) == "F0 B0 F1 B1 F2 B2"
    first, second = lowered(2, 1, 3)
    assert _short(first) == "F0 F0> F1 F1> <B0 B0 <B1 F2 F2> B1 <B2 B2"
    assert _short(second) == "<F0 <F1 F0 B0 B0> F1 B1 B1> <F2 F2 B2 B2>"


def test_interleaved_on_two_ranks() -> None:
    # chunk 1 is written with a dash
    assert _short(actions(2, 2, 2, rank=0)) == "F0 F1 F0' F1' B0' B1' B0 B1"
    assert _short(actions(2, 2, 2, rank=1)) == "F0 F1 F0' B0' F1' B1' B0 B1"
    first, second = lowered(2, 2, 2)
    around = Recv("F", micro_batch=0, chunk=1, boundary=1, peer=1)
    assert around in first and Send("F", micro_batch=0, chunk=0, boundary=1, peer=0) in second


def _short(steps: list[Any]) -> str:
    marks = {Action: ("", ""), Send: ("", ">"), Recv: ("<", "")}
    return " ".join(
        f"{marks[type(step)][0]}{step.kind}{step.micro_batch}{chr(39) * step.chunk}{marks[type(step)][1]}"
        for step in steps
    )


def test_actions_equal_torchs() -> None:
    for pipe, virtual, m in SIZES:
        for rank in range(pipe):
            own = [(a.chunk * pipe + rank, a.kind, a.micro_batch) for a in actions(pipe, virtual, m, rank)]
            torchs_own = run_by_torch(pipe, m, rank) if virtual == 1 else torchs_table(pipe, virtual, m, rank)
            assert own == torchs_own, (pipe, virtual, m, rank)


def torchs_table(pipe: int, virtual: int, m: int, rank: int) -> list[tuple[int, str, int]]:
    """Torch's interleaved order of one rank: stage, kind, micro-batch."""
    table = torchs.ScheduleInterleaved1F1B._calculate_single_rank_operations(_shape(pipe, virtual, m), rank)
    kinds = {torchs.FORWARD: "F", torchs.FULL_BACKWARD: "B"}
    return [
        (entry.stage_index, kinds[entry.computation_type], entry.microbatch_index)
        for entry in table
        if entry is not None
    ]


def run_by_torch(pipe: int, m: int, rank: int) -> list[tuple[int, str, int]]:
    """Torch's 1F1B order as it runs it: its table numbers the last rank's forward passes from 1 (torch 2.13)."""
    order: list[tuple[int, str, int]] = []
    stage = Mock(stage_index=rank)
    stage.forward_one_chunk.side_effect = lambda i, *_, **__: order.append((rank, "F", i))
    stage.backward_one_chunk.side_effect = lambda i, **_: order.append((rank, "B", i))
    for name in ("get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops"):
        getattr(stage, name).return_value = []
    schedule = Mock(_stage=stage, _num_stages=pipe, _n_microbatches=m)
    schedule._check_inputs.return_value = ([()] * m, [{}] * m)
    torchs.Schedule1F1B._step_microbatches(schedule)
    return order


def _shape(pipe: int, virtual: int, m: int) -> SimpleNamespace:
    return SimpleNamespace(
        n_local_stages=virtual, pp_group_size=pipe, microbatches_per_round=pipe, _n_microbatches=m
    )


def test_each_pass_once_and_forward_first() -> None:
    for pipe, virtual, m in SIZES:
        for rank in range(pipe):
            order = actions(pipe, virtual, m, rank)
            at = {action: index for index, action in enumerate(order)}
            assert len(at) == len(order) == 2 * m * virtual
            for micro_batch in range(m):
                for chunk in range(virtual):
                    assert at[Action("F", micro_batch, chunk)] < at[Action("B", micro_batch, chunk)]


def test_lowering_adds_transfers_and_keeps_the_order_of_passes() -> None:
    for pipe, virtual, m in SIZES:
        for rank, steps in enumerate(lists_of(pipe, virtual, m)):
            assert [s for s in steps if isinstance(s, Action)] == actions(pipe, virtual, m, rank)
            sent = [message(s) for s in steps if isinstance(s, Send)]
            received = [message(s) for s in steps if isinstance(s, Recv)]
            assert len(set(sent)) == len(sent) and len(set(received)) == len(received)
            # All passes receive and send; but nothing comes before the first stage or goes behind the last one.
            outer = m * (rank in (0, pipe - 1))
            assert len(sent) == len(received) == (2 * m * virtual - outer if pipe > 1 else 0)


def test_nothing_blocks_where_every_step_waits_for_its_partner() -> None:
    for pipe, virtual, m in SIZES:
        assert stuck(lists_of(pipe, virtual, m), pipe * virtual) == [], (pipe, virtual, m)


def test_receiving_before_use_and_sending_after_computing_blocks() -> None:
    sizes = [size for size in SIZES if size[0] > 1]
    blocked = [size for size in sizes if stuck(naive(*size), size[0] * size[1])]
    assert (len(blocked), len(sizes)) == (183, 190)
    assert {m for _, _, m in set(sizes) - set(blocked)} == {1}


def naive(pipe: int, virtual: int, m: int) -> list[list[Step]]:
    """Each rank's own idea: receive right before a pass, send right after it."""
    orders = []
    for steps in lists_of(pipe, virtual, m):
        transfers = {(type(step), *message(step)): step for step in steps}
        keys = [
            (kind, *message(step))
            for step in steps
            if isinstance(step, Action)
            for kind in (Recv, Action, Send)
        ]
        orders.append([transfers[key] for key in keys if key in transfers])
    return orders


def test_pairs_see_their_messages_in_one_order() -> None:
    for pipe, virtual, m in SIZES:
        lists = lists_of(pipe, virtual, m)
        for one in range(pipe):
            for other in range(one):
                assert between(lists, one, other) == between(lists, other, one), (pipe, virtual, m)


def between(lists: list[list[Step]], rank: int, peer: int) -> list[tuple[str, int, int, int]]:
    """The messages between two ranks in the order of the first one's list: kind, micro-batch, boundary, sender."""
    return [
        (step.kind, step.micro_batch, step.boundary, rank if isinstance(step, Send) else peer)
        for step in lists[rank]
        if not isinstance(step, Action) and step.peer == peer
    ]


def test_activations_alive_reach_their_bound_and_no_more() -> None:
    for pipe, virtual, m in SIZES:
        for rank in range(pipe):
            alive = peak = 0
            for action in actions(pipe, virtual, m, rank):
                alive += 1 if action.kind == "F" else -1
                peak = max(peak, alive)
            assert peak == peak_activations(pipe, virtual, m, rank), (pipe, virtual, m, rank)
            if virtual == 1:
                assert peak == min(pipe - rank, m)
    assert (
        peak_activations(4, 2, 16, rank=0) == 11
    )  # 2 x 3 + 4 + 1 of half a rank's layers; 1F1B holds 4 of all


def test_few_messages_wait_for_their_use() -> None:
    most = {False: 0, True: 0}
    for pipe, virtual, m in SIZES:
        for steps in lists_of(pipe, virtual, m):
            waiting: set[tuple[str, int, int]] = set()
            for step in steps:
                if isinstance(step, Recv):
                    waiting.add(message(step))
                elif isinstance(step, Action):
                    waiting.discard(message(step))
                most[virtual > 1] = max(most[virtual > 1], len(waiting))
    assert most == {False: 2, True: 4}


def test_idle_time_is_the_known_share() -> None:
    for pipe, virtual, m in SIZES:
        busy = 3 * virtual * m
        time = makespan(lists_of(pipe, virtual, m), UNIT_COST)
        assert Fraction(time - busy) / Fraction(time) == bubble_frac(pipe, virtual, m), (pipe, virtual, m)
    assert bubble_frac(4, 1, 8) == Fraction(3, 11) and bubble_frac(4, 2, 8) == Fraction(3, 19)


def test_transfers_hide_behind_passes() -> None:
    # 16 x 4 x 2 x 2 transfers of each rank, a quarter of a forward pass each, are 64 of 201 units on its channel; what
    # is not hidden is the way through the 16 stages and back: 30 of them.
    assert makespan(lists_of(4, 4, 16), UNIT_COST, transfer=0.25) == 201 + 30 * 0.25


@pytest.mark.parametrize(("m", "one_forward_one_backward", "zero_bubble"), [(8, 33, 27), (16, 57, 51)])
def test_what_a_zero_bubble_schedule_would_gain(
    m: int, one_forward_one_backward: int, zero_bubble: int
) -> None:
    """The figures of the module's docstring: why none is there."""
    assert makespan(lists_of(4, 1, m), UNIT_COST) == one_forward_one_backward
    assert time_of_torchs_zero_bubble(4, m) == (zero_bubble, [4, 4, 4, 4])
    assert makespan(lists_of(4, 4, m), UNIT_COST) / 4 == 3 * m + 2.25 < zero_bubble


def time_of_torchs_zero_bubble(pipe: int, m: int) -> tuple[int, list[int]]:
    """Its end, if forward pass, gradients of inputs and of weights take 1 each, and micro-batches held at once."""
    table = torchs.ScheduleInterleavedZeroBubble._calculate_single_rank_operations
    orders = [[entry for entry in table(_shape(pipe, 1, m), rank) if entry] for rank in range(pipe)]
    forward, inputs, weights = torchs.FORWARD, torchs.BACKWARD_INPUT, torchs.BACKWARD_WEIGHT
    ends: dict[tuple[int, Any, int], int] = {(-1, forward, i): 0 for i in range(m)}
    free, alive, peak = [0] * pipe, [0] * pipe, [0] * pipe
    while any(orders):
        for rank, order in enumerate(orders):
            while order:
                kind, i = order[0].computation_type, order[0].microbatch_index
                last = rank == pipe - 1
                needed = {
                    forward: (rank - 1, forward, i),
                    inputs: (rank, forward, i) if last else (rank + 1, inputs, i),
                    weights: (rank, inputs, i),
                }[kind]
                if needed not in ends:
                    break
                order.pop(0)
                free[rank] = ends[rank, kind, i] = max(free[rank], ends[needed]) + 1
                alive[rank] += {forward: 1, inputs: 0, weights: -1}[kind]
                peak[rank] = max(peak[rank], alive[rank])
    return max(free), peak


def test_forward_passes_alone_take_any_number_of_micro_batches() -> None:
    for pipe, virtual in {size[:2] for size in SIZES}:
        for m in (1, 2, 5):
            lists = lowered_forward(pipe, virtual, m)
            assert stuck(lists, pipe * virtual) == []
            for steps in lists:
                assert [s for s in steps if isinstance(s, Action)] == forward_actions(pipe, virtual, m)
    assert _short(forward_actions(2, 2, 3)) == "F0 F1 F0' F1' F2 F2'"


def test_dummies_fill_up_groups_of_micro_batches() -> None:
    assert [with_dummies(4, 2, m) for m in (1, 4, 5)] == [4, 4, 8]
    assert [with_dummies(4, 1, m) for m in (1, 4, 5)] == [1, 4, 5]
    with pytest.raises(ValueError, match="6 micro-batches, expected a multiple of 4 with V 2"):
        actions(4, 2, 6, rank=0)
    with pytest.raises(ValueError, match="V is 2 with P = 1"):
        lowered(1, 2, 2)
