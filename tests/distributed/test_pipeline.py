"""What a pipeline holds, sends and idles is what its schedule says; and these tests see it when parts are left out.

Run with ``pytest tests/distributed/test_pipeline.py``.
"""

import importlib
import time
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fairseq_moe.parallel.schedule import bubble_frac, peak_activations
from tests.helpers.pipelines import EVEN, P2, P4, V2, Case, assert_same, found_alone, found_on_ranks
from tests.helpers.ranks import REPOSITORY, RankError, run_ranks

MODEL = (
    "--moe-freq", 0, "--moe-expert-count", 0, "--moe-second-expert-policy", "sampling", "--moe-gate-loss-wt", 1,
    "--num-experts", 4, "--moe-aux-loss-coeff", 0.2, "--decoder-layers", 8, "--moe-layer-freq", "[0,1]*4",
)  # fmt: skip
SEQUENCES, LENGTH, WIDTH, EXPERTS, LAYERS = 2, 6, 8, 4, 4
NUM_MICRO_BATCHES = 16


def _update(trainer: Any, num_micro_batches: int) -> None:
    from tests.helpers.tiny import make_batch, update

    batches = [make_batch(seed, num_sequences=SEQUENCES, length=LENGTH) for seed in range(num_micro_batches)]
    assert update(trainer, batches)


def _facts(rank: int, layouts: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    return [_facts_of(layout) for layout in layouts]


def _facts_of(layout: tuple[Any, ...]) -> dict[str, Any]:
    """Count what is held and sent in an update."""
    import fairseq_moe.distributed.pipeline as pipeline
    from fairseq_moe.stock.step.pipelining import _Update
    from tests.helpers.tiny import build_trainer

    trainer = build_trainer([*MODEL, *layout])
    held: list[tuple[int, int]] = []
    sent: Counter[int] = Counter()
    living: list[Any] = []
    most_living = 0
    forward, isend = _Update._forward, pipeline.dist.isend

    def counting(self: Any, *args: Any) -> Any:
        found = forward(self, *args)
        held.append((len(self._outputs), len(self._inputs)))
        return found

    def sending(tensor: Tensor, **to: Any) -> Any:
        nonlocal most_living
        sent[tensor.numel() * tensor.element_size()] += 1
        living.append(weakref.ref(tensor))
        most_living = max(most_living, sum(ref() is not None for ref in living))
        return isend(tensor, **to)

    _Update._forward, pipeline.dist.isend = counting, sending  # type: ignore[method-assign]
    try:
        _update(trainer, NUM_MICRO_BATCHES)
    finally:
        _Update._forward, pipeline.dist.isend = forward, isend  # type: ignore[method-assign]
    return {
        "outputs": max(outputs for outputs, _ in held),
        "inputs": max(inputs for _, inputs in held),
        "sent": dict(sent),
        "most_living": most_living,
        "watches": trainer.criterion.load_watch is trainer.get_model().decoder.load_watch,
    }


@pytest.fixture(scope="module")
def facts() -> dict[tuple[int, int], list[dict[str, Any]]]:
    """What each rank has counted, by P and V."""
    found = {}
    for pipe, flags in ((2, P2), (4, P4)):
        by_rank = run_ranks(_facts, pipe, [flags, (*flags, *V2)], timeout=120)
        for index, virtual in enumerate((1, 2)):
            found[pipe, virtual] = [own[index] for own in by_rank]
    return found


SIZES = pytest.mark.parametrize(("pipe", "virtual"), [(2, 1), (2, 2), (4, 1), (4, 2)])


@SIZES
def test_as_many_activations_are_held_as_the_schedule_says(facts: Any, pipe: int, virtual: int) -> None:
    for rank, found in enumerate(facts[pipe, virtual]):
        peak = peak_activations(pipe, virtual, NUM_MICRO_BATCHES, rank)
        assert found["outputs"] == peak < NUM_MICRO_BATCHES * virtual
        assert (found["inputs"] == peak) if rank > 0 else (found["inputs"] <= peak)


@SIZES
def test_one_hidden_and_one_side_tensor_cross_each_boundary_in_each_direction(
    facts: Any, pipe: int, virtual: int
) -> None:
    side = LAYERS * (_num_losses() + 12 * EXPERTS + _num_measures()) * 4
    hidden = SEQUENCES * LENGTH * WIDTH * 4
    assert hidden != side
    for rank, found in enumerate(facts[pipe, virtual]):
        stages = [chunk * pipe + rank for chunk in range(virtual)]
        messages = sum((stage < pipe * virtual - 1) + (stage > 0) for stage in stages) * NUM_MICRO_BATCHES
        assert found["sent"] == {hidden: messages, side: messages}


@SIZES
def test_what_was_sent_is_not_kept_until_the_end_of_the_update(facts: Any, pipe: int, virtual: int) -> None:
    for found in facts[pipe, virtual]:
        assert 0 < found["most_living"] <= 10 < sum(found["sent"].values())


@SIZES
def test_the_rank_that_warns_of_a_collapsed_router_looks_at_the_load(
    facts: Any, pipe: int, virtual: int
) -> None:
    assert all(found["watches"] for found in facts[pipe, virtual])


def _num_losses() -> int:
    from fairseq_moe.modules import LOSSES

    return len(LOSSES)


def _num_measures() -> int:
    from fairseq_moe.modules.routing.stats import MEASURES

    return len(MEASURES)


DELAY_SEC = 0.15  # long beside what a message takes on a machine that others use, too


class _Slow(torch.autograd.Function):
    """Take a known time in both directions; a rank that sleeps needs no core."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        time.sleep(DELAY_SEC)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        time.sleep(2 * DELAY_SEC)
        return grad


def _idle_frac(rank: int, layout: tuple[Any, ...], num_micro_batches: int) -> float:
    """Measure which share of an update's schedule this rank does not compute."""
    import torch.distributed as dist

    import fairseq_moe.stock.step.pipelining as pipelining
    from tests.helpers.tiny import build_trainer

    trainer = build_trainer([*MODEL, *layout])
    for layer in trainer.get_model().decoder.layers:
        if layer is not None:
            layer.register_forward_hook(lambda module, args, output: (_Slow.apply(output[0]), *output[1:]))
    run_steps, compute = pipelining.run_steps, pipelining._Update.compute
    busy = total = 0.0

    def computing(self: Any, *args: Any) -> Any:
        nonlocal busy
        start = time.monotonic()
        found = compute(self, *args)
        busy += time.monotonic() - start
        return found

    def running(*args: Any) -> None:
        nonlocal total
        dist.barrier()
        start = time.monotonic()
        run_steps(*args)
        dist.barrier()
        total = time.monotonic() - start

    pipelining.run_steps, pipelining._Update.compute = running, computing  # type: ignore[method-assign]
    _update(trainer, num_micro_batches)
    return 1 - busy / total


@pytest.mark.parallel
@pytest.mark.timeout(300)
@pytest.mark.parametrize("virtual", [1, 2])
def test_the_bubble_is_the_formulas(virtual: int) -> None:
    layout, expected = (*P4, *(V2 if virtual == 2 else ())), float(bubble_frac(4, virtual, 4))
    found = []
    for _ in range(5):  # other tests run on the same cores; a wrong schedule is wrong every time
        by_rank = run_ranks(_idle_frac, 4, layout, 4, timeout=50)
        found.append(sum(by_rank) / 4)
        if found[-1] == pytest.approx(expected, rel=0.1):
            return
    pytest.fail(f"bubbles of {found}, expected {expected:.3f}")


def _sum_tied_words_once() -> None:
    import fairseq_moe.stock.step.gradients as gradients

    gradients._sum_at_both_ends = lambda parameters, ends: None


def _count_tied_words_twice() -> None:
    import fairseq_moe.stock.step.gradients as gradients

    gradients.is_second_end = lambda *args: False  # type: ignore[attr-defined]


def _drop_earlier_losses() -> None:
    from fairseq_moe.models.stage_values import SideTensor

    pack = SideTensor.pack

    def without(self: Any, auxes: Any, earlier: Any, x_BSD: Any) -> Any:
        side = pack(self, auxes, earlier, x_BSD).clone()
        side[:, : _num_losses()] = 0
        return side

    SideTensor.pack = without  # type: ignore[method-assign]


def _keep_gradients_of_losses() -> None:
    from fairseq_moe.stock.step.pipelining import _Update

    backward = _Update._backward

    def without(self: Any, *args: Any) -> Any:
        x, side = backward(self, *args) or (None, None)
        return [] if x is None else [x, torch.zeros_like(side)]

    _Update._backward = without  # type: ignore[method-assign]


ONE_UPDATE = Case(name="one update", model=MODEL, updates=EVEN[:1])


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found_alone([ONE_UPDATE], tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize(
    ("mutation", "complaint"),
    [
        (_sum_tied_words_once, "ranks hold different decoder.embed_tokens.weight"),
        (_count_tied_words_twice, "update 0: gnorm"),
        (_drop_earlier_losses, "update 0: (loss|moe_aux_loss)"),
        (_keep_gradients_of_losses, "update 0: gnorm|gradients: decoder.layers"),
    ],
)
def test_these_tests_see_what_is_left_out(
    mutation: Any, complaint: str, expected: Any, tmp_path: Path
) -> None:
    with pytest.raises((AssertionError, RankError), match=complaint):
        _assert_one_update_is_right(mutation, expected, tmp_path)


def _assert_one_update_is_right(mutation: Any, expected: Any, folder: Path) -> None:
    found = found_on_ranks([ONE_UPDATE], folder, prepare=mutation)
    assert_same(ONE_UPDATE, found[ONE_UPDATE.name], expected[ONE_UPDATE.name])


def _reference_rows(rank: int) -> list[dict[str, Any]]:
    import sys

    sys.path.insert(0, str(REPOSITORY / "scripts"))
    script = importlib.import_module("reference_mappings")
    return [
        {
            "total": row.total,
            "published": row.published,
            "built": len(row.built),
            "stages": [len(row.layers), len(row.layers[0])],
            "layers": {length for chunks in row.layers for length in chunks},
            "experts": (row.experts, row.expert_parts),
            "schedules": len(row.steps),
        }
        for row in script.rows()
    ]


@pytest.mark.parallel
@pytest.mark.timeout(240)
def test_the_reference_mappings_are_built_placed_and_scheduled_at_full_size() -> None:
    (rows,) = run_ranks(_reference_rows, 1, timeout=220)
    assert [row["published"] for row in rows] == [46_702_792_704, 140_630_071_296]
    assert [row["total"] for row in rows] == [row["published"] for row in rows]
    assert [row["stages"] for row in rows] == [[4, 8], [8, 7]]
    assert [row["layers"] for row in rows] == [{1}, {1}]
    assert [row["experts"] for row in rows] == [(1, 1), (4, 4)]
    assert [row["built"] for row in rows] == [4, 32] and [row["schedules"] for row in rows] == [4, 8]
