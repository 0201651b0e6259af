"""Three Adam updates on tensor and context ranks are those of one process with all micro-batches, on every rank.

Run with ``pytest tests/distributed/test_axes_updates.py``. One start of 2 or 4 ranks runs all cases of its size.
Batches of unequal lengths, of one position, and none on a data rank take part; a validation follows. Commands:
tests/e2e/test_axes_training.py.
"""

import functools
from typing import Any

import pytest
from torch import Tensor

from tests.helpers.axes import (
    BRANCH,
    C2,
    C2T2,
    C2T2X2,
    GPT,
    GROUPED,
    HALVES,
    LATENT,
    LOSSES,
    PAIRS,
    QUANTILE,
    T2,
    T2X2,
    T4,
    ZERO1,
    ZERO3,
    Job,
    numbers_of_ranks,
    updates_of_jobs,
)
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.timeout(600)  # the first test starts all ranks

CLIPPED = (*GPT, "--clip-norm", 0.05)
RECOMPUTED = "--checkpoint-activations"
LAYER_RECOMPUTED = "--moe-layer-recompute"
DOUBLE: dict[int, dict[str, Job]] = {
    2: {
        "T2 E2": Job(model=LOSSES, layout=T2),
        "T2 E2, clipped and recomputed": Job(model=CLIPPED, layout=(*T2, RECOMPUTED)),
        "T2 E2, the branch's gates": Job(model=BRANCH, layout=T2),
        "T2 X2, full norm": Job(model=GROUPED, layout=T2X2),
        "C2 E2, layers recomputed": Job(model=LATENT, layout=(*C2, LAYER_RECOMPUTED)),
        "C2 E2, clipped and recomputed": Job(model=CLIPPED, layout=(*C2, RECOMPUTED)),
        "C2 E2, the branch's gates": Job(model=BRANCH, layout=C2),
        "C2 E2, padded": Job(model=(*LOSSES, "--use-moe-pad-mask"), layout=C2, num_padded=3),
        "T2 E2, padded": Job(model=(*GPT, "--use-moe-pad-mask", "false"), layout=T2, num_padded=3),
        "T2 X2, padded": Job(model=(*GROUPED, "--use-moe-pad-mask"), layout=T2X2, num_padded=3),
    },
    4: {
        "C2 T2 E4": Job(model=(*LOSSES, "--moe-per-layer-logging"), layout=C2T2),
        "C2 T2 E2, quantiles": Job(model=QUANTILE, layout=(*C2T2, *PAIRS)),
        "C2 T2 E2 X2": Job(model=LATENT, layout=C2T2X2),
        "C2 T2 E4, padded": Job(model=(*LOSSES, "--use-moe-pad-mask"), layout=C2T2, num_padded=3),
        "D2 T2 E4": Job(model=GPT, layout=T2, data=2),
        "D2 C2 E4, all losses": Job(model=LOSSES, layout=C2, data=2),
        "D2 C2 E2 X2": Job(model=GROUPED, layout=(*C2, *PAIRS, *HALVES), data=2),
        "D2 T2 E2 X2, ZeRO-1": Job(model=LATENT, layout=(*T2X2, *ZERO1), data=2),
        "D2 T2 E2, ZeRO-3, recomputed": Job(model=LOSSES, layout=(*T2, *PAIRS, *ZERO3, RECOMPUTED), data=2),
        "D2 C2 E2, ZeRO-3": Job(model=GROUPED, layout=(*C2, *PAIRS, *ZERO3), data=2),
        "D2 C2 E4, ZeRO-1, clipped": Job(model=CLIPPED, layout=(*C2, *ZERO1), data=2),
        "T4 E4": Job(model=LATENT, layout=T4),
    },
}
WIDE = {"D2 C2 T2 E4 X2, ZeRO-1": Job(model=LATENT, layout=(*C2T2X2, *ZERO1), data=2)}
FLOAT32 = {
    2: {"T2 X2": Job(model=GROUPED, layout=T2X2, is_double=False)},
    4: {
        "C2 T2 E4": Job(model=LOSSES, layout=C2T2, is_double=False),
        "D2 C2 E2, ZeRO-3": Job(model=LATENT, layout=(*C2, *PAIRS, *ZERO3), data=2, is_double=False),
    },
}
FP16 = ("--fp16", "--fp16-no-flatten-grads")
OVERFLOWS = ("--fp16-init-scale", 2**19)  # gradients of logits are above what half precision can hold
HALF_FLAGS = {
    "bf16": ("--bf16",),
    "memory-efficient bf16": ("--memory-efficient-bf16",),
    "fp16": (*FP16, "--fp16-init-scale", 4),
    "memory-efficient fp16": ("--memory-efficient-fp16", "--fp16-init-scale", 4),
    "fp16, overflowing": (*FP16, *OVERFLOWS),
    "memory-efficient fp16, overflowing": ("--memory-efficient-fp16", *OVERFLOWS),
}
HALF_LAYOUTS = {2: {"C2": (C2, 1), "T2": (T2, 1)}, 4: {"D2 T2 ZeRO-1": ((*T2, *ZERO1), 2)}}
HALF = {
    size: {
        f"{layout}, {name}": Job(model=(*GPT, *half), layout=flags, data=data, is_double=False)
        for layout, (flags, data) in layouts.items()
        for name, half in HALF_FLAGS.items()
    }
    for size, layouts in HALF_LAYOUTS.items()
}
ALL = {size: DOUBLE[size] | FLOAT32[size] | HALF[size] for size in DOUBLE} | {8: WIDE}


@functools.cache
def found_on(world_size: int) -> dict[str, list[dict[str, Any]]]:
    jobs = ALL[world_size]
    by_rank = run_ranks(updates_of_jobs, world_size, list(jobs.values()), timeout=250)
    return dict(zip(jobs, zip(*by_rank, strict=True), strict=True))  # type: ignore[arg-type]


@functools.cache
def references() -> dict[Job, dict[str, Any]]:
    jobs = [job for size in ALL for job in ALL[size].values()]
    found: dict[Job, dict[str, Any]] = {}
    for count in (1, 2):
        own = list(dict.fromkeys(job.reference for job in jobs if job.num_reference_ranks == count))
        found |= zip(own, run_ranks(updates_of_jobs, count, own, timeout=250)[0], strict=True)
    return found


def cases(of: dict[int, dict[str, Job]]) -> list[tuple[int, str]]:
    return [(size, name) for size, jobs in of.items() for name in jobs]


def assert_same_logs(
    found: dict[str, Any], expected: dict[str, Any], *, rel: float, names: tuple[str, ...] = ()
) -> None:
    """Compare the logs of updates and of the validation: all numbers but times, or those that are named."""
    assert len(found["logged"]) == len(expected["logged"])
    pairs = [
        *zip(found["logged"], expected["logged"], strict=True),
        (found["validated"], expected["validated"]),
    ]
    for own, wanted in pairs:
        own, wanted = numbers_of_ranks(own), numbers_of_ranks(wanted)
        assert own.keys() == wanted.keys()
        for name, value in wanted.items():
            if not names or name in names:
                assert own[name] == pytest.approx(value, rel=rel, abs=rel), name


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float((found[name].double() - tensor.double()).abs().max()) <= bound, name


def check_in_double_precision(world_size: int, name: str) -> None:
    expected = references()[ALL[world_size][name].reference]
    for found in found_on(world_size)[name]:
        assert_same_logs(found, expected, rel=2e-6)
        assert_close(found["parameters"], expected["parameters"], 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "name"), cases(DOUBLE))
def test_updates_in_double_precision(world_size: int, name: str) -> None:
    check_in_double_precision(world_size, name)


@pytest.mark.parallel
@pytest.mark.parametrize("name", WIDE)
def test_updates_on_eight_ranks(name: str) -> None:
    check_in_double_precision(8, name)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "name"), cases(FLOAT32))
def test_updates_in_single_precision(world_size: int, name: str) -> None:
    expected = references()[ALL[world_size][name].reference]
    for found in found_on(world_size)[name]:
        assert_same_logs(found, expected, rel=2e-5)
        assert_close(found["parameters"], expected["parameters"], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "name"), cases(HALF))
def test_updates_in_half_precision(world_size: int, name: str) -> None:
    """All ranks skip the same updates, and log the same."""
    expected = references()[ALL[world_size][name].reference]
    skipped = [not logged for logged in expected["logged"]]
    assert any(skipped) is ("overflowing" in name)
    by_rank = found_on(world_size)[name]
    for found in by_rank:
        assert [not logged for logged in found["logged"]] == skipped
        assert_same_logs(found, expected, rel=3e-2, names=("loss", "inner_loss", "gnorm"))
        assert_close(found["parameters"], expected["parameters"], 3e-2)
        assert_same_logs(found, by_rank[0], rel=1e-12)


@pytest.mark.slow
def test_all_cases_train() -> None:
    """Clipping clips, losses are there, and parameters move by more than any bound."""
    for job, found in references().items():
        taken = [logged for logged in found["logged"] if logged]
        assert len({logged["loss"] for logged in taken}) == len(taken)
        if "--clip-norm" in job.model:
            assert all(logged["gnorm"] > 0.05 for logged in taken)
        assert found["validated"]["loss"] > 0
    for model, name in ((LATENT, "expert_bias"), (QUANTILE, "expert_bias")):
        biases = [t for key, t in references()[Job(model=model)]["parameters"].items() if name in key]
        assert biases and all(bias.any() for bias in biases)
    losses = references()[Job(model=LOSSES)]["logged"][0]
    assert losses["moe_seq_aux_loss"] > 0 and losses["moe_global_aux_loss"] > 0 and losses["moe_z_loss"] > 0
