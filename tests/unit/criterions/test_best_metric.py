"""--best-checkpoint-metric: the metrics that we say there are, are those that validation logs."""

from typing import Any

import pytest

from tests.helpers.ranks import run_ranks

_MEGATRON = ["--moe-freq", "0", "--moe-expert-count", "0", "--num-experts", "4", "--moe-layer-freq", "[0,1]"]
_MEGATRON += ["--moe-gate-loss-wt", "1.0"]
_STOCK = {"_name": "cross_entropy", "sentence_avg": False}
_SMOOTHED = {"_name": "label_smoothed_cross_entropy", "label_smoothing": 0.1, "sentence_avg": False}
# Flags of the run, and the criterion that takes the place of moe_cross_entropy.
_CASES: dict[str, tuple[list[str], dict[str, Any] | None]] = {
    "moe_cross_entropy": ([], None),
    "moe_cross_entropy by sentence": (["--sentence-avg"], None),
    "moe_cross_entropy by layer": (["--moe-per-layer-logging"], None),
    "Megatron's routing by layer": ([*_MEGATRON, "--moe-per-layer-logging"], None),
    "cross_entropy": ([], _STOCK),
    "cross_entropy by sentence": ([], {**_STOCK, "sentence_avg": True}),
    "label smoothing": ([], _SMOOTHED),
    "label smoothing with accuracy": ([], {**_SMOOTHED, "report_accuracy": True}),
}
_NOT_LISTED = {"bsz", "wpb", "wps", "n_correct", "total"}  # there, and nothing to choose by


def _logged_and_listed(rank: int, names: list[str]) -> dict[str, tuple[set[str], list[str] | None]]:
    from fairseq.logging import metrics
    from omegaconf import OmegaConf, open_dict

    from fairseq_moe.criterions.best_metric import validation_metrics
    from tests.helpers.tiny import build_trainer, make_batch

    found = {}
    for name in names:
        flags, criterion = _CASES[name]
        trainer = build_trainer(flags)
        if criterion is not None:
            with open_dict(trainer.cfg):
                trainer.cfg.criterion = OmegaConf.create(criterion)
            trainer._criterion = trainer.task.build_criterion(trainer.cfg.criterion)
        with metrics.aggregate(new_root=True) as logged:
            trainer.valid_step(make_batch(1))
        found[name] = (set(logged.get_smoothed_values()), validation_metrics(trainer.cfg))
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return run_ranks(_logged_and_listed, 1, list(_CASES), timeout=110)[0]


@pytest.mark.parametrize("name", _CASES)
def test_metrics_of_validation(name: str, found: dict[str, Any]) -> None:
    logged, listed = found[name]
    assert sorted(listed) == sorted(logged - _NOT_LISTED)


def _problems(rank: int, cases: list[dict[str, Any]]) -> list[list[str]]:
    from omegaconf import OmegaConf

    from fairseq_moe.criterions.best_metric import best_metric_problems

    base = {
        "model": {"moe_freq": 2, "moe_expert_count": 4, "decoder_layers": 2},
        "task": {"_name": "language_modeling"},
        "criterion": {"_name": "moe_cross_entropy", "sentence_avg": False},
        "dataset": {"disable_validation": False},
        "checkpoint": {"best_checkpoint_metric": "bleu"},
    }
    return [best_metric_problems(OmegaConf.merge(base, case)) for case in cases]


def test_what_nobody_can_know_is_not_refused() -> None:
    [(refused, *accepted)] = run_ranks(
        _problems,
        1,
        [
            {},
            {"criterion": {"_name": "somebody_elses"}},
            {"task": {"_name": "translation"}},  # adds BLEU
            {"task": {"_name": "somebody_elses"}},
            {"dataset": {"disable_validation": True}},  # nothing is looked up
            {"model": {"moe_freq": 0}},  # dense: stock's business
            {"checkpoint": {"best_checkpoint_metric": "wps"}},
        ],
    )
    assert len(refused) == 1 and refused[0].startswith("--best-checkpoint-metric is bleu")
    assert accepted == [[]] * len(accepted)
