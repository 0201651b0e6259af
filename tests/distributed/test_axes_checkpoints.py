"""Checkpoints between all layouts of tensor, context, expert and data ranks: equal to the bit, then the same update.

Run with ``pytest tests/distributed/test_axes_checkpoints.py``, and with ``-m parallel`` for what takes long. One start
of each number of ranks writes, and one reads, for all layouts of a test.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.helpers.axes_layouts import LAYOUTS, MODELS, PIPELINES, WINDOWS
from tests.helpers.checkpoints import assert_same, contents, manifest_of
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.timeout(600)

NUM_BATCHES = 4  # of an update, over all data ranks
NUM_UPDATES = 2  # before a save
LAST = "checkpoint_last.pt"
# A large epsilon: otherwise Adam turns the rounding of vanishing gradients into whole steps. The rate changes with
# each update, so that a schedule that began afresh would show.
TRAINING = (
    "--adam-eps", 1e-3, "--lr-scheduler", "inverse_sqrt", "--warmup-updates", 4,
)  # fmt: skip
UNTIED = ("--untied",)  # of these tests alone
LOGGED = ("loss", "gnorm", "lr", "moe_aux_loss", "loss_scale")
# What each rank holds of a parameter in other ways.
OF_HALVES = (
    "D4 E4", "D2 T2 E2", "C2 T2 E2 X2", "D2 C2 E2, ZeRO-3", "D2 T2 E2, ZeRO-1", "P2 T2", "P2 D2, ZeRO-1",
)  # fmt: skip
PURE_FP16 = ("--memory-efficient-fp16", "--fp16-init-scale", 4)
# Flags, and a bound of relative differences of the next update.
PRECISIONS: dict[str, tuple[tuple[Any, ...], float]] = {
    "fp16": (("--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", 4), 4e-3),
    "memory-efficient fp16": (PURE_FP16, 4e-3),
    # Their scales are powers of two, so that other cuts of a tensor, with other scales, hold the same numbers.
    "half-precision moments": ((*PURE_FP16, "--fp16-adam-stats"), 4e-3),
    "bf16": (("--bf16",), 3e-2),
}
IN_BACKGROUND = (
    "T2 X2", "C2 E2", "P2", "D2 T2 E2, ZeRO-1", "D2 C2 E2, ZeRO-3", "C2 T2 E2 X2", "P2 V2 C2, ZeRO-3",
)  # fmt: skip


class Job(NamedTuple):
    """Say what ranks do with a checkpoint.

    Args:
        layout: a key of ``LAYOUTS``.
        folder: to write into.
        source: to read before; empty: train and write.
    """

    layout: str
    folder: str
    source: str = ""


class Next(NamedTuple):
    """Hold what comes after a checkpoint.

    Args:
        logged: loss, norm and learning rate of the next update.
        parameters: after it, whole.
        position: what the reader made of the position in the data.
    """

    logged: dict[str, float]
    parameters: dict[str, Tensor]
    position: int


def start(job: Job, flags: Sequence[Any], dtype: torch.dtype) -> Any:
    from fairseq.data import Dictionary

    from tests.helpers import tiny
    from tests.helpers.saves import TinyRun

    Dictionary.pad_to_multiple_ = lambda self, factor: (
        None
    )  # 45 words, which no number of tensor ranks divides
    if "--untied" in flags:
        tiny.TINY_FLAGS = [flag for flag in tiny.TINY_FLAGS if "share-decoder" not in flag]
        flags = [flag for flag in flags if flag != "--untied"]
    own = ["--dict-size", 41, *TRAINING, *flags, *LAYOUTS[job.layout].flags]
    return TinyRun(Path(job.folder), *own, dtype=dtype)


def train(run: Any, num_updates: int) -> dict[str, float]:
    """Do updates on the same batches whatever the layout; returns what the last one logs."""
    from tests.helpers.tiny import make_batch, update

    data, logged = run.trainer, {}
    for _ in range(num_updates):
        lr = run.trainer.get_lr()
        seeds = range(100 * run.num_updates, 100 * run.num_updates + NUM_BATCHES)
        own = seeds[data.data_parallel_rank :: data.data_parallel_world_size]
        # Lengths that the shards of a sequence do not divide; equal ones, as stock's counts of tokens are by data rank.
        logged = update(run.trainer, [make_batch(seed, length=9) for seed in own]) | {"lr": lr}
    return {name: logged[name] for name in LOGGED if name in logged}


def after(run: Any, position: int) -> Next:
    from tests.helpers.tiny import parameters

    logged = train(run, 1)
    assert run.num_updates == NUM_UPDATES + 1
    return Next(logged, parameters(run.trainer), position)


def write(job: Job, flags: Sequence[Any], dtype: torch.dtype) -> Next:
    """Do two updates, save, and do one more."""
    run = start(job, flags, dtype)
    train(run, NUM_UPDATES)
    run.save()
    return after(run, NUM_UPDATES)


def rewrite(jobs: list[Job], flags: Sequence[Any], dtype: torch.dtype) -> list[Next]:
    """Load, save and do one update; the model was in use before, so copies of its old numbers could lie about."""
    run, found = start(jobs[0], flags, dtype), []
    train(run, 1)
    for job in jobs:
        run.checkpoint_cfg.save_dir = job.folder
        position = run.load(Path(job.source))["train_iterator"]["iterations_in_epoch"]
        run.save()
        found.append(after(run, position))
    return found


def run_jobs(
    rank: int, writing: list[Job], reading: list[list[Job]], flags: Sequence[Any], dtype: torch.dtype
) -> dict[Job, Next]:
    """Write all, then read all; the jobs of one reader are one list."""
    found = {job: write(job, flags, dtype) for job in writing}
    for jobs in reading:
        found |= zip(jobs, rewrite(jobs, flags, dtype), strict=True)
    return found if rank == 0 else {job: each._replace(parameters={}) for job, each in found.items()}


def check(
    pairs: Iterable[tuple[str, str]],
    folder: Path,
    flags: Sequence[Any],
    *,
    dtype: torch.dtype = torch.float32,
    bound: float = 1e-5,
) -> None:
    """Each second layout of a pair reads what the first has written, writes the same again, and continues alike.

    Args:
        pairs: of keys of ``LAYOUTS``, writer and reader.
        folder: for checkpoints.
        flags: of the model and its precision.
        dtype: of the model.
        bound: of relative differences of the next update.
    """
    pairs = list(pairs)
    writing = {name: Job(name, str(folder / name)) for name, _ in pairs}
    reading = {
        (source, name): Job(name, str(folder / f"{source} {name}"), str(folder / source / LAST))
        for source, name in pairs
    }
    found: dict[Job, Next] = {}
    sizes = sorted({LAYOUTS[name].ranks for pair in pairs for name in pair})
    for size in (*sizes, *sizes[-2::-1]):  # the largest writes and reads in one start
        own = [job for job in writing.values() if LAYOUTS[job.layout].ranks == size and job not in found]
        by_reader: dict[str, list[Job]] = {}
        if all(job in found or job in own for job in writing.values()):
            for job in reading.values():
                if LAYOUTS[job.layout].ranks == size:
                    by_reader.setdefault(job.layout, []).append(job)
        if own or by_reader:
            by_rank = run_ranks(run_jobs, size, own, [*by_reader.values()], list(flags), dtype, timeout=500)
            found |= by_rank[0]
            for other in by_rank[1:]:
                assert all(other[job].logged == pytest.approx(by_rank[0][job].logged) for job in other)
    assert len(found) == len(writing) + len(reading)
    for (source, name), job in reading.items():
        assert_same(contents(Path(job.folder, LAST)), contents(Path(job.source)))
        assert len(manifest_of(Path(job.folder, LAST))["shards"]) == LAYOUTS[name].ranks
        assert_continues(found[job], found[writing[source]], bound)
        moved = NUM_UPDATES * LAYOUTS[source].data // LAYOUTS[name].data
        assert found[job].position == moved, (source, name)


def assert_continues(found: Next, expected: Next, bound: float) -> None:
    assert found.logged == pytest.approx(expected.logged, rel=bound)
    assert found.parameters.keys() == expected.parameters.keys()
    total = torch.stack([tensor.double().norm() for tensor in expected.parameters.values()]).norm()
    for name, tensor in expected.parameters.items():
        difference = (found.parameters[name].double() - tensor.double()).norm()
        assert difference <= bound * (tensor.double().norm() + 0.1 * total), name


WITHOUT_WINDOWS = MODELS["grouped"][: -len(WINDOWS)]  # which say nothing of blocks that guess further
PREDICTING = (*WITHOUT_WINDOWS, "--mtp-layers", 1, "--mtp-loss-weight", 0.3)
OF_PIPELINES = {"tied": MODELS["grouped"], "untied": (*MODELS["grouped"], *UNTIED), "predicting": PREDICTING}


@pytest.mark.parametrize(
    "model", ["tied", *(pytest.param(name, marks=pytest.mark.slow) for name in ("untied", "predicting"))]
)
def test_pipelines_and_other_layouts_read_one_another(model: str, tmp_path: Path) -> None:
    """Where tensor or context ranks train, prediction blocks wait, so those layouts are left out then."""
    names = ["2 ranks", "P2", "alone", "P2 V2"]
    if model != "predicting":
        names += ["T2 X2"]
    check(ring(names), tmp_path, OF_PIPELINES[model], dtype=torch.float64, bound=1e-11)


def ring(names: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(names, [*names[1:], names[0]], strict=True))


@pytest.mark.parallel
@pytest.mark.parametrize("model", MODELS)
def test_layouts_read_one_another_in_a_ring(model: str, tmp_path: Path) -> None:
    flags = MODELS[model] if model == "latent" else (*MODELS[model], *UNTIED)
    # In float32 a value at the bound of a clamp may fall on either side of it, and with it a gradient.
    precision: dict[str, Any] = {"dtype": torch.float64, "bound": 1e-11} if model == "grouped" else {}
    check(ring([*LAYOUTS]), tmp_path, flags, **precision)


@pytest.mark.parallel
def test_every_layout_reads_several_others(tmp_path: Path) -> None:
    """Four others, near and far in the list; those with pipelines read one another in rings."""
    names = [name for name in LAYOUTS if name not in PIPELINES]
    pairs = [(names[index - distance], name) for index, name in enumerate(names) for distance in (1, 2, 5, 7)]
    check(pairs, tmp_path, MODELS["grouped"], dtype=torch.float64, bound=1e-11)


@pytest.mark.parallel
@pytest.mark.parametrize("precision", PRECISIONS)
def test_half_precision_is_read_and_written_to_the_bit(precision: str, tmp_path: Path) -> None:
    flags, bound = PRECISIONS[precision]
    check(ring(OF_HALVES), tmp_path, (*MODELS["latent"], *flags), bound=bound)


@pytest.mark.parallel
@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "bf16"])
def test_half_precision_of_stages_is_read_by_others_and_the_other_way_round(
    precision: str, tmp_path: Path
) -> None:
    flags, bound = PRECISIONS[precision]
    pairs = [("P2", "alone"), ("alone", "P2"), ("P2", "T2 X2"), ("T2 X2", "P2"), ("P2 V2", "P2")]
    check(pairs, tmp_path, (*MODELS["grouped"], *flags), bound=bound)


def save_twice(rank: int, layouts: list[str], folder: str) -> dict[str, list[bool]]:
    """Save at once and, in a run of its own, in the background; tell when the file of the second was there."""
    from fairseq_moe.faults import VARIABLE
    from fairseq_moe.stock.run import end_of_run

    seen = {}
    for layout in layouts:
        now, later = (Job(layout, f"{folder}/{layout} {when}") for when in ("now", "later"))
        write(now, MODELS["latent"], torch.float32)
        run = start(later, [*MODELS["latent"], "--save-in-background"], torch.float32)
        train(run, NUM_UPDATES)
        # So that an update comes before rank 1 has written. Each text counts once.
        os.environ[VARIABLE] = f"save.shard_half@1@1=sleep:{3 + len(seen) / 10}"
        run.save()
        seen[layout] = [Path(later.folder, LAST).exists()]
        train(run, 1)
        end_of_run()
        seen[layout].append(Path(later.folder, LAST).exists())
        del os.environ[VARIABLE]
    return seen


@pytest.mark.slow
def test_a_background_save_holds_the_state_of_its_update(tmp_path: Path) -> None:
    for size in (2, 4):
        layouts = [name for name in IN_BACKGROUND if LAYOUTS[name].ranks == size]
        seen = run_ranks(save_twice, size, layouts, str(tmp_path), timeout=300)[0]
        for name in layouts:
            assert seen[name] == [False, True]
            found, expected = (contents(tmp_path / f"{name} {when}" / LAST) for when in ("later", "now"))
            assert_same(found, expected)


def write_without_gates(rank: int, job: Job) -> Next:
    """Write as one who takes gate and up rows for one block: equal to the bit when it is read by the same ranks."""
    from fairseq_moe.distributed import joining

    cuts = joining._cuts
    joining._cuts = lambda placement, mesh: (
        (cut._replace(blocks=1), count) for cut, count in cuts(placement, mesh)
    )
    return write(job, MODELS["grouped"], torch.float32)


def test_rows_in_another_order_are_seen(tmp_path: Path) -> None:
    source, reader = tmp_path / "T2 X2", Job("alone", str(tmp_path / "alone"), str(tmp_path / "T2 X2" / LAST))
    written = run_ranks(write_without_gates, 2, Job("T2 X2", str(source)))[0]
    (read,) = run_ranks(run_jobs, 1, [], [[reader]], MODELS["grouped"], torch.float32)
    assert_same(contents(Path(reader.folder, LAST)), contents(source / LAST))
    with pytest.raises(AssertionError, match=r"loss|gnorm|fc1"):
        assert_continues(read[reader], written, 1e-5)
