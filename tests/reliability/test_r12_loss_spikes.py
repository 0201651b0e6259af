"""R12: where it is asked for, an update with a finite loss far above the usual is skipped, by all ranks."""

import math
from pathlib import Path
from typing import Any

import pytest

from fairseq_moe.flags.reliability import ReliabilityConfig
from fairseq_moe.stock.step.loss_spikes import LossSpikes
from tests.helpers.ranks import run_ranks


def _usual(count: int) -> list[float]:
    """Losses around 3 that differ by at most 0.1."""
    return [3.0 + 0.1 * math.sin(step) for step in range(count)]


def _spikes(losses: list[float], *, factor: float | None = 6.0) -> list[int]:
    """Which of ``losses``, seen one after the other, are spikes."""
    seen = LossSpikes(factor)
    return [index for index, loss in enumerate(losses) if seen.problem(loss) is not None]


def test_a_loss_far_above_the_others_is_a_spike() -> None:
    assert _spikes([*_usual(60), 4.0, *_usual(20)]) == [60]


def _is_spike(loss: float) -> bool:
    """Whether ``loss`` is one after 20 losses of 2 and 20 of 4, with factor 1000.

    Their median is 3 and their median absolute deviation 1, so the limit is 3 + 1000 * 1.4826 = 1485.6.
    """
    return 40 in _spikes([*([2.0, 4.0] * 20), loss], factor=1000.0)


def test_the_limit_counts_in_standard_deviations_of_a_normal_distribution() -> None:
    assert not _is_spike(1485.5)
    assert _is_spike(1485.7)


@pytest.mark.parametrize(("sigmas_per_mad", "loss"), [(1.4824, 1485.5), (1.4828, 1485.7), (1.0, 1485.5)])
def test_this_test_sees_another_constant(
    sigmas_per_mad: float, loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = _is_spike(loss)
    monkeypatch.setattr("fairseq_moe.stock.step.loss_spikes._SIGMAS_PER_MAD", sigmas_per_mad)
    assert _is_spike(loss) != right


def test_nothing_is_a_spike_at_first_or_unasked_or_below() -> None:
    assert _spikes([*_usual(20), 40.0]) == []
    assert _spikes([*_usual(60), 40.0], factor=None) == []
    assert _spikes([*_usual(60), 0.1]) == []


def test_losses_that_are_not_finite_do_not_blind_it() -> None:
    bad = [math.nan, math.inf, math.nan]
    assert 66 in _spikes([*_usual(60), *bad, *_usual(3), 4.0])


def test_many_spikes_do_not_raise_the_limit_but_a_new_level_does() -> None:
    often = [loss for usual in _usual(90) for loss in ([usual, 9.0] if usual > 3.09 else [usual])]
    assert [often[index] for index in _spikes(often)] == [9.0] * len(_spikes(often)) != []
    assert max(_spikes([*_usual(60), *(loss + 2 for loss in _usual(200))])) < 200


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_a_factor_that_means_nothing_is_refused(factor: float) -> None:
    [problem] = ReliabilityConfig(skip_loss_spikes_factor=factor).problems()
    assert problem.startswith("--skip-loss-spikes-factor is ")


def _spike_on_one_rank(rank: int, save_dir: str) -> tuple[list[bool], int]:
    from tests.helpers.tiny import build_trainer, make_batch, update

    flags = ["--save-dir", save_dir, "--lr", 1e-6, "--skip-loss-spikes-factor", 6]
    trainer = build_trainer(flags)
    state = {"scale": 1.0}

    def scaled(module: Any, args: Any, output: Any) -> Any:
        loss, sample_size, logged = output
        return loss * state["scale"], sample_size, logged

    trainer.criterion.register_forward_hook(scaled)
    stepped = []
    for step in range(36):
        state["scale"] = 3.0 if rank == 1 and step == 34 else 1.0
        stepped.append(bool(update(trainer, [make_batch(step + 100 * rank)])))
    return stepped, trainer.get_num_updates()


def test_a_spike_on_one_rank_is_skipped_by_all(tmp_path: Path) -> None:
    for stepped, updates in run_ranks(_spike_on_one_rank, 2, str(tmp_path)):
        assert [step for step, done in enumerate(stepped) if not done] == [34]
        assert updates == 35
