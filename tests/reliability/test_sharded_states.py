"""Checkpoints of states sharded by torch's fully_shard: what any backend on any number of ranks writes, any reads.

Stop and resume, other layouts in the middle of an epoch, kills, bad gradients and signals: ``test_r01``, ``test_r06``,
``test_r07``, ``test_r11``, ``test_r20``, ``test_r22`` and ``test_background_saves``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.backends import BACKENDS, ZERO
from tests.helpers.checkpoints import assert_moments_are_rounded, assert_same, contents, manifest_of
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.timeout(400)

# Few of these divide evenly: on four ranks the last part of most tensors is empty.
SIZES = ["--decoder-embed-dim", 6, "--decoder-ffn-embed-dim", 9]
NUM_BATCHES = 4  # of an update, over all ranks
LAST = "checkpoint_last.pt"
ADAM_STATS = "--fp16-adam-stats"
HALF = ["--memory-efficient-fp16", "--fp16-init-scale", 4]
PRECISIONS = {
    "fp16": ["--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", 4],
    "memory-efficient-fp16": HALF,
    "bf16": ["--bf16"],
    "fp16-adam-stats": [ADAM_STATS, *HALF],
}

Job = tuple[str, str, list[Any]]  # a checkpoint to read, a directory to write, flags


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where and how states are held.

    Args:
        world_size: number of ranks.
        backend: one of ``BACKENDS``.
        flags: of the model and its precision.
    """

    world_size: int
    backend: str
    flags: tuple[Any, ...] = ()

    @property
    def argv(self) -> list[Any]:
        return [*BACKENDS[self.backend], *self.flags]


def start(folder: str, *flags: Any) -> Any:
    from tests.helpers.saves import TinyRun

    return TinyRun(Path(folder), *SIZES, *flags)


def train(run: Any, num_updates: int) -> list[float]:
    """Updates on the same batches whatever the number of ranks; returns the losses."""
    from fairseq_moe.distributed import rank, world_size
    from tests.helpers.tiny import make_batch, update

    def micro_batches() -> list[Any]:
        seeds = range(100 * run.num_updates, 100 * run.num_updates + NUM_BATCHES)
        return [make_batch(seed) for seed in seeds[rank() :: world_size()]]

    return [update(run.trainer, micro_batches())["loss"] for _ in range(num_updates)]


def validate(run: Any) -> None:
    from tests.helpers.tiny import make_batch

    run.trainer.valid_step(make_batch(7))


def write(rank: int, jobs: Sequence[tuple[str, list[Any]]]) -> list[float]:
    """Two updates, a save and one update more, whose losses are returned."""
    losses = []
    for folder, flags in jobs:
        run = start(folder, *flags)
        train(run, 2)
        run.save()
        losses += train(run, 1)
    return losses


def rewrite(rank: int, jobs: Sequence[Job]) -> list[float]:
    """Load, save and do one update; the model was in use before, so copies of its old weights could lie about."""
    losses = []
    for source, folder, flags in jobs:
        run = start(folder, *flags)
        train(run, 1)
        validate(run)
        run.load(Path(source))
        run.save()
        losses += train(run, 1)
    return losses


@dataclass(frozen=True, kw_only=True)
class Written:
    """A checkpoint, and the loss of its writer's next update."""

    path: Path
    next_loss: float


def write_each(folder: Path, layouts: Sequence[Layout]) -> dict[Layout, Written]:
    """Checkpoints of two updates; one start for each number of ranks."""
    found = {}
    for world_size in sorted({layout.world_size for layout in layouts}):
        own = [layout for layout in layouts if layout.world_size == world_size]
        directories = [folder / f"{world_size}-{number}" for number in range(len(own))]
        jobs = [(str(directory), layout.argv) for layout, directory in zip(own, directories, strict=True)]
        losses = run_ranks(write, world_size, jobs, timeout=300)[0]
        for layout, directory, loss in zip(own, directories, losses, strict=True):
            found[layout] = Written(path=directory / LAST, next_loss=loss)
    return found


def check_rewriting(pairs: Sequence[tuple[Written, Layout]], folder: Path) -> None:
    """Each layout, all on as many ranks, writes again what it reads, and continues from it as its writer does."""
    targets = [folder / str(number) for number in range(len(pairs))]
    jobs = [
        (str(source.path), str(target), layout.argv)
        for (source, layout), target in zip(pairs, targets, strict=True)
    ]
    (world_size,) = {layout.world_size for _, layout in pairs}
    losses = run_ranks(rewrite, world_size, jobs, timeout=300)[0]
    for (source, layout), target, loss in zip(pairs, targets, losses, strict=True):
        assert len(manifest_of(target / LAST)["shards"]) == layout.world_size
        compare = assert_moments_are_rounded if ADAM_STATS in layout.flags else assert_same
        compare(contents(target / LAST), contents(source.path))
        assert loss == pytest.approx(source.next_loss, rel=1e-6)


FEW = ("--moe-expert-count", 2)
SOURCES = [
    Layout(world_size=world_size, backend=backend, flags=FEW)
    for world_size, backend in ((2, "pytorch_ddp"), (2, "fully_sharded"), (4, "zero1"), (4, "zero3"))
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Written]:
    """What some layouts have written; four ranks hold each of two experts twice."""
    return write_each(tmp_path_factory.mktemp("written"), SOURCES)


@pytest.mark.parametrize(("world_size", "backends"), [(1, ["legacy_ddp"]), (2, ZERO), (4, ZERO)])
def test_other_layouts_read_and_write_the_same_to_the_bit(
    world_size: int, backends: list[str], written: dict[Layout, Written], tmp_path: Path
) -> None:
    readers = [Layout(world_size=world_size, backend=backend, flags=FEW) for backend in backends]
    check_rewriting([(source, reader) for source in written.values() for reader in readers], tmp_path)


def test_half_precision_is_read_and_written_to_the_bit(tmp_path: Path) -> None:
    """Half-precision moments are written in float32, and read from either; their rounding is random."""
    made = {
        (name, backend): Layout(world_size=2, backend=backend, flags=tuple(flags))
        for name, flags in PRECISIONS.items()
        for backend in ("legacy_ddp", *ZERO)
    }
    sources = write_each(tmp_path / "a", [layout for layout in made.values() if layout.backend != "zero1"])
    pairs = [
        (saved, reader)
        for source, saved in sources.items()
        for reader in made.values()
        if reader.flags == source.flags and reader != source
    ]
    to_half = made["fp16-adam-stats", "zero1"]
    pairs.append((sources[made["memory-efficient-fp16", "zero3"]], to_half))
    check_rewriting(pairs, tmp_path / "b")


def save_around_a_validation(rank: int, folder: str, flags: list[Any]) -> None:
    """Every update has two micro-batches on each of two ranks."""
    run = start(folder, *flags, "--update-freq", 2)

    def save(name: str) -> None:
        run.checkpoint_cfg.save_dir = f"{folder}/{name}"
        run.save()

    train(run, 1)
    save("before")
    validate(run)
    save("after")
    train(run, 1)
    validate(run)
    save("validated")
    plain = start(f"{folder}/plain", *flags, "--update-freq", 2)
    train(plain, 2)
    plain.save()


@pytest.mark.parametrize("backend", ZERO)
def test_a_validation_changes_neither_the_next_save_nor_the_next_update(backend: str, tmp_path: Path) -> None:
    run_ranks(save_around_a_validation, 2, str(tmp_path), BACKENDS[backend])
    before, after, validated, plain = (
        contents(tmp_path / name / LAST) for name in ("before", "after", "validated", "plain")
    )
    assert_same(after, before)
    assert_same(validated, plain)
    with pytest.raises(AssertionError):
        assert_same(validated, before)


WIDE = (*FEW, "--decoder-ffn-embed-dim", 12)
HALVES = (*WIDE, "--expert-tensor-parallel-size", 2)
TWICE = (*HALVES, "--expert-model-parallel-size", 1)  # on four ranks


def test_experts_in_halves_are_written_whole_and_read_by_any_layout(tmp_path: Path) -> None:
    sources = write_each(
        tmp_path / "a",
        [
            Layout(world_size=2, backend="legacy_ddp", flags=WIDE),
            Layout(world_size=2, backend="legacy_ddp", flags=HALVES),
            Layout(world_size=4, backend="zero3", flags=TWICE),
        ],
    )
    for world_size, readers in {
        1: [("legacy_ddp", WIDE)],
        2: [("legacy_ddp", HALVES), ("zero1", HALVES), ("zero3", WIDE)],
        4: [("pytorch_ddp", TWICE), ("zero1", TWICE)],
    }.items():
        layouts = [Layout(world_size=world_size, backend=backend, flags=flags) for backend, flags in readers]
        pairs = [(source, layout) for source in sources.values() for layout in layouts]
        check_rewriting(pairs, tmp_path / f"b{world_size}")


def combinations(num_experts: int) -> list[Layout]:
    flags = ("--moe-expert-count", num_experts)
    return [
        Layout(world_size=world_size, backend=backend, flags=flags)
        for world_size in (1, 2, 4)
        for backend in BACKENDS
        if world_size > 1 or backend not in ZERO
    ]


@pytest.mark.parallel
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("num_experts", [2, 4])
def test_every_layout_reads_every_other(num_experts: int, world_size: int, tmp_path: Path) -> None:
    sources = write_each(tmp_path / "a", combinations(num_experts))
    readers = [layout for layout in combinations(num_experts) if layout.world_size == world_size]
    check_rewriting([(source, reader) for source in sources.values() for reader in readers], tmp_path / "b")


@pytest.mark.parallel
@pytest.mark.parametrize("precision", PRECISIONS)
def test_half_precision_on_four_ranks_with_each_expert_twice(precision: str, tmp_path: Path) -> None:
    layouts = [
        Layout(world_size=4, backend=backend, flags=(*PRECISIONS[precision], *FEW))
        for backend in ("legacy_ddp", *ZERO)
    ]
    sources = write_each(tmp_path / "a", layouts)
    check_rewriting([(source, reader) for source in sources.values() for reader in layouts], tmp_path / "b")
