"""R11: a loss or gradient that is not finite on one rank makes all ranks skip the same update, and is named.

That parameters and moments stay as they are to the bit, in every precision and backend, is shown by
``tests/distributed/test_grad_norm.py``.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.backends import AXES, BACKENDS, PIPELINES, ZERO
from tests.helpers.ranks import run_ranks

_EXPERT = "decoder.layers.1.moe_layer.experts.fc1_weight"
_DENSE = "decoder.layers.0.fc1.weight"
_BAD_RANK = 1


def _messages() -> list[str]:
    """What the guard says on this rank from now on."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fairseq_moe.stock.step.guard").addHandler(handler)
    return said


def _spoiler(model: Any, name: str) -> dict[str, bool]:
    """While its ``on`` is true, the gradient of that parameter is NaN in this rank's backward pass."""
    state = {"on": False}
    owner, _, own_name = name.rpartition(".")

    def spoil(module: Any, args: Any) -> None:
        parameter = getattr(module, own_name)  # where it is sharded, the whole one of this pass
        if parameter.requires_grad:
            parameter.register_hook(lambda grad: grad * math.nan if state["on"] else grad)

    model.get_submodule(owner).register_forward_pre_hook(spoil)
    return state


def _trainer(save_dir: str, *flags: Any) -> Any:
    from tests.helpers.tiny import build_trainer

    return build_trainer(["--optimizer", "adam", "--lr", 0.01, "--save-dir", save_dir, *flags])


def _spoil_each_in_turn(
    rank: int, save_dir: str, flags: list[Any], blind: bool, bad_ranks: Sequence[int] = (_BAD_RANK, _BAD_RANK)
) -> dict[str, Any]:
    from fairseq_moe.stock.step.guard import StepGuard
    from tests.helpers.tiny import make_batch, update

    if blind:
        StepGuard.see_before_sum = lambda self, parameters: None
    said = _messages()
    trainer = _trainer(save_dir, *flags)
    spoilers = [
        _spoiler(trainer.get_model(), name) if rank == bad_rank else {}
        for bad_rank, name in zip(bad_ranks, (_EXPERT, _DENSE), strict=True)
    ]
    outcomes = []
    for step, bad in enumerate([None, 0, None, 1]):
        for number, spoiler in enumerate(spoilers):
            spoiler["on"] = number == bad
        outcomes.append(bool(update(trainer, [make_batch(10 * step + trainer.data_parallel_rank)])))
    return {"stepped": outcomes, "updates": trainer.get_num_updates(), "said": said}


def _sentence(cause: str, *, update: int) -> str:
    rest = f"(1 in a row after update {update}, at 10 the run ends)."
    return f"{cause}; all ranks skip this update {rest}"


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (2, ["--ddp-backend", "legacy_ddp"]),
        (4, ["--ddp-backend", "legacy_ddp", "--moe-expert-count", 2]),  # each expert has two replicas
        (2, ["--ddp-backend", "legacy_ddp", "--bf16"]),
        (2, ["--ddp-backend", "legacy_ddp", "--tensor-model-parallel-size", "2", "--sequence-parallel"]),
        (2, ["--ddp-backend", "legacy_ddp", "--context-parallel-size", "2"]),
    ],
    ids=["2 ranks", "4 ranks with replicas", "bf16", "tensor", "context"],
)
def test_the_bad_gradient_is_named_with_its_rank(world_size: int, flags: list[Any], tmp_path: Path) -> None:
    found = run_ranks(_spoil_each_in_turn, world_size, str(tmp_path), flags, False, timeout=50)
    for rank, result in enumerate(found):
        assert result["stepped"] == [True, False, True, False]
        assert result["updates"] == 2
        causes = [f"the gradient of {name} on rank {_BAD_RANK} is not finite" for name in (_EXPERT, _DENSE)]
        expected = [_sentence(cause, update=update) for update, cause in enumerate(causes, start=1)]
        assert result["said"] == (expected if rank == 0 else [])


@pytest.mark.parametrize("freq", [1, 4])
def test_the_bad_gradient_of_one_stage_is_named(freq: int, tmp_path: Path) -> None:
    """Each layer is on the rank of its stage alone."""
    flags, bad_ranks = [*PIPELINES["P2"], "--update-freq", freq], (1, 0)
    found = run_ranks(_spoil_each_in_turn, 2, str(tmp_path), flags, False, bad_ranks)
    assert [result["stepped"] for result in found] == [[True, False, True, False]] * 2
    expected = [
        _sentence(f"the gradient of {name} on rank {bad_rank} is not finite", update=update)
        for update, bad_rank, name in ((1, 1, _EXPERT), (2, 0, _DENSE))
    ]
    assert [result["said"] for result in found] == [expected, []]


@pytest.mark.parametrize("backend", ["pytorch_ddp", *ZERO])
def test_a_gradient_that_was_summed_already_is_named_without_a_rank(backend: str, tmp_path: Path) -> None:
    found = run_ranks(_spoil_each_in_turn, 2, str(tmp_path), BACKENDS[backend], False)
    assert [result["stepped"] for result in found] == [[True, False, True, False]] * 2
    of_one = f"the gradient of {_EXPERT} on rank {_BAD_RANK} is not finite"
    summed = f"the gradient of {_DENSE}, summed over ranks, is not finite"
    assert found[0]["said"] == [_sentence(of_one, update=1), _sentence(summed, update=2)]


def test_this_test_sees_a_guard_that_looks_after_the_sum_only(tmp_path: Path) -> None:
    flags = ["--ddp-backend", "legacy_ddp"]
    found = run_ranks(_spoil_each_in_turn, 2, str(tmp_path), flags, True)
    assert "summed over ranks" in found[0]["said"][1]


def _spoil_the_loss(rank: int, save_dir: str, blind: bool, flags: Sequence[str] = ()) -> dict[str, Any]:
    from fairseq_moe.stock.step.guard import StepGuard
    from tests.helpers.tiny import make_batch, parameters, update

    if blind:
        StepGuard.see_loss = lambda self, loss, sample_size: None
    said = _messages()
    trainer = _trainer(save_dir, *flags)
    before = parameters(trainer)
    if rank == _BAD_RANK:
        trainer.criterion.register_forward_hook(_infinite_constant)
    stepped = bool(update(trainer, [make_batch(trainer.data_parallel_rank)]))
    changed = [name for name, tensor in parameters(trainer).items() if not torch.equal(before[name], tensor)]
    return {"stepped": stepped, "changed": changed, "said": said}


def _infinite_constant(module: Any, args: Any, output: Any) -> Any:
    loss, sample_size, logged = output
    return loss + math.inf, sample_size, logged  # its gradient is as before


@pytest.mark.parametrize("backend", ["pytorch_ddp", "zero3", *AXES, *PIPELINES])
def test_a_bad_loss_with_good_gradients_is_skipped_too(backend: str, tmp_path: Path) -> None:
    found = run_ranks(_spoil_the_loss, 2, str(tmp_path), False, (BACKENDS | AXES | PIPELINES)[backend])
    assert [result["stepped"] for result in found] == [False, False]
    assert [result["changed"] for result in found] == [[], []]
    assert found[0]["said"] == [_sentence(f"the loss on rank {_BAD_RANK} is not finite", update=0)]


def test_this_test_sees_a_guard_that_does_not_look_at_losses(tmp_path: Path) -> None:
    assert [result["stepped"] for result in run_ranks(_spoil_the_loss, 2, str(tmp_path), True)] == [True] * 2


def _spoil_until_the_end(rank: int, save_dir: str) -> tuple[int, str, bool]:
    from fairseq_moe.errors import NonFiniteError
    from tests.helpers.tiny import make_batch, update

    trainer = _trainer(save_dir, "--max-skipped-updates", 3)
    spoiler = _spoiler(trainer.get_model(), _EXPERT)

    def step(*, spoilt: bool) -> None:
        spoiler["on"] = spoilt and rank == _BAD_RANK
        update(trainer, [make_batch(rank)])

    for spoilt in (True, True, False, True, True):  # never three in a row
        step(spoilt=spoilt)
    with pytest.raises(NonFiniteError) as caught:
        step(spoilt=True)
    return trainer.get_num_updates(), str(caught.value), caught.value.agreed


def test_too_many_in_a_row_end_the_run_with_one_sentence_on_all_ranks(tmp_path: Path) -> None:
    results = run_ranks(_spoil_until_the_end, 2, str(tmp_path))
    assert results[0] == results[1]
    updates, sentence, agreed = results[0]
    assert updates == 1
    assert agreed
    assert sentence.startswith(
        "3 updates in a row were skipped after update 1, the last one because the gradient"
    )
    assert f"{_EXPERT} on rank {_BAD_RANK}" in sentence
    assert "--max-skipped-updates" in sentence


def _smallest_loss_scale(rank: int, save_dir: str) -> tuple[str, int]:
    from fairseq_moe.errors import NonFiniteError
    from tests.helpers.tiny import make_batch, update

    trainer = _trainer(save_dir, "--memory-efficient-fp16", "--min-loss-scale", 1.0, "--fp16-init-scale", 2)
    _spoiler(trainer.get_model(), _EXPERT)["on"] = rank == _BAD_RANK
    forwards: list[int] = []
    trainer.get_model().register_forward_pre_hook(lambda module, args: forwards.append(1))
    with pytest.raises(NonFiniteError) as caught:
        update(trainer, [make_batch(rank)])
    return str(caught.value), len(forwards)


def test_fp16_at_its_smallest_loss_scale_runs_no_model_again(tmp_path: Path) -> None:
    for sentence, num_forwards in run_ranks(_smallest_loss_scale, 2, str(tmp_path)):
        assert sentence.startswith("Minimum loss scale reached (1.0).")
        assert num_forwards == 1


def _meet_at_different_updates(rank: int, save_dir: str) -> str:
    from fairseq_moe.errors import RanksDisagreeError
    from tests.helpers.tiny import make_batch, update

    trainer = _trainer(save_dir)
    trainer.set_num_updates(7 + rank)
    with pytest.raises(RanksDisagreeError) as caught:
        update(trainer, [make_batch(rank)])
    return str(caught.value)


def test_ranks_at_different_updates_say_so(tmp_path: Path) -> None:
    for sentence in run_ranks(_meet_at_different_updates, 2, str(tmp_path)):
        assert sentence.startswith("ranks have met at different updates (rank 0: 7, rank 1: 8)")


def _large_and_finite(rank: int) -> tuple[int, str]:
    from fairseq_moe.flags.reliability import ReliabilityConfig
    from fairseq_moe.parallel.ranks import RankGrid
    from fairseq_moe.stock.step.guard import StepGuard

    model = torch.nn.Linear(2, 2, bias=False).half()
    model.weight.grad = torch.full_like(model.weight, 6e4)  # their norm is above what half precision can hold
    guard = StepGuard(ReliabilityConfig(), RankGrid(data=1))
    guard.see_before_sum([model.weight])
    return guard._finding(dict(model.named_parameters()))


def test_a_finite_gradient_is_not_blamed_for_its_large_norm() -> None:
    assert run_ranks(_large_and_finite, 1) == [(4, "the norm of all gradients is not finite")]
