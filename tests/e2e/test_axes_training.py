"""fairseq-train on tensor, context and pipeline ranks: parameters, logs and expert loads are those of one process."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import DENSE, eval_lm, json_lines, perplexity, train, train_argv
from tests.e2e.processes import console_script, run_process, torchrun
from tests.helpers.axes import C2, C2T2X2, GPT, PAIRS, T2, T2X2, ZERO1, ZERO3
from tests.helpers.checkpoints import contents
from tests.helpers.pipelines import P2, P4, V2
from tests.helpers.ranks import CommandResult

# A large epsilon: otherwise Adam turns the rounding of vanishing gradients into whole steps.
MODEL = [
    *DENSE,
    *map(str, GPT),
    "--criterion",
    "moe_cross_entropy",
    "--dropout",
    "0",
    "--attention-dropout",
    "0",
]
MODEL += ["--adam-eps", "1e-3", "--clip-norm", "0.5"]
UPDATES = ("--max-update", "3", "--validate-interval-updates", "2", "--moe-per-layer-logging")
MIXES: dict[str, tuple[int, int, tuple[Any, ...]]] = {  # ranks, data ranks, flags
    "T2E2": (2, 1, T2),
    "C2E2": (2, 1, C2),
    "C2T2E2X2": (4, 1, C2T2X2),
    "D2T2E4 ZeRO-1": (4, 2, (*T2, *ZERO1)),
    "D2C2E2 ZeRO-3": (4, 2, (*C2, *PAIRS, *ZERO3)),
}
FOUR_LAYERS = ("--decoder-layers", 4, "--moe-layer-freq", "[0,1,0,1]")
MICRO_BATCHES = 4  # of a pipeline's update, over all data ranks
PIPELINES: dict[str, tuple[int, int, tuple[Any, ...]]] = {  # the same; of four layers
    "P2T2E2": (4, 1, (*P2, *T2)),
    "P2V2T2X2": (4, 1, (*P2, *V2, *T2X2)),
    "P2D2 ZeRO-1": (4, 2, (*P2, *ZERO1)),
    "P2V2C2 ZeRO-3": (4, 1, (*P2, *V2, *C2, *ZERO3)),
    "P4": (4, 1, P4),
}


Alone = Callable[..., tuple[CommandResult, Path]]


@pytest.fixture(scope="module")
def alone(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """``alone(micro_batches, *flags)``: the run of one process with so many in an update, and its directory."""

    @functools.cache
    def run(micro_batches: int, *flags: Any) -> tuple[CommandResult, Path]:
        folder = tmp_path_factory.mktemp("alone")
        own = (*UPDATES, *flags, "--update-freq", micro_batches)
        return train(text_data, folder, *own, model=MODEL), folder

    return run


def assert_same_records(found: CommandResult, expected: CommandResult, kind: str, data: int) -> None:
    for own, wanted in zip(json_lines(found, kind), json_lines(expected, kind), strict=True):
        assert own.keys() == wanted.keys()
        for name, value in wanted.items():
            is_speed = "time" in name or "wall" in name or name.endswith(("ups", "wps"))
            # Of all data ranks together, whose steps are averaged.
            is_of_a_step = name.endswith(("wpb", "bsz", "violation")) or "_load_expert" in name
            is_of_a_step = is_of_a_step and kind == "valid" and data > 1
            if not (is_speed or is_of_a_step or name == "gb_free"):
                # Printed with three digits behind the point.
                assert float(own[name]) == pytest.approx(float(value), rel=2e-6, abs=1.1e-3), (kind, name)


def loads(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "moe_load.jsonl").read_text().splitlines()]


def assert_same_run(
    found: CommandResult, own_folder: Path, expected: tuple[CommandResult, Path], data: int
) -> None:
    """Compare every record, the loads of experts and the last checkpoint's parameters."""
    result, folder = expected
    for kind in ("train_inner", "train", "valid"):
        assert_same_records(found, result, kind, data)
    assert all("train_inner" not in output for output in found.outputs[1:])  # rank 0 speaks
    assert loads(own_folder) == loads(folder)
    own, wanted = (contents(path / "checkpoint_last.pt") for path in (own_folder, folder))
    assert own.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if name.startswith("model/"):
            assert float((own[name].double() - tensor.double()).abs().max()) <= 1e-5, name


@pytest.mark.parametrize("mix", MIXES)
def test_the_command_trains_as_one_process_does(
    mix: str, alone: Alone, text_data: Path, tmp_path: Path
) -> None:
    world_size, data, flags = MIXES[mix]
    expected = alone(data)
    found = train(text_data, tmp_path, *UPDATES, *flags, world_size=world_size, model=MODEL)
    assert_same_run(found, tmp_path, expected, data)
    if mix == "C2T2E2X2":
        scores = [
            perplexity(eval_lm(text_data, path / "checkpoint_last.pt")) for path in (tmp_path, expected[1])
        ]
        assert scores[0] == pytest.approx(scores[1], abs=0.011)


@pytest.mark.parametrize("mix", PIPELINES)
def test_a_pipeline_trains_as_one_process_does(
    mix: str, alone: Alone, text_data: Path, tmp_path: Path
) -> None:
    world_size, data, flags = PIPELINES[mix]
    flags = (*UPDATES, *FOUR_LAYERS, *flags, "--update-freq", MICRO_BATCHES // data)
    found = train(text_data, tmp_path, *flags, world_size=world_size, model=MODEL)
    assert_same_run(found, tmp_path, alone(MICRO_BATCHES, *FOUR_LAYERS), data)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("start", ["by torchrun", "spawned"])
def test_a_pipeline_of_real_processes_trains_as_one_process_does(
    start: str, alone: Alone, text_data: Path, tmp_path: Path
) -> None:
    flags = (*UPDATES, *FOUR_LAYERS, *P2, *V2, "--update-freq", MICRO_BATCHES)
    command = [console_script("fairseq-train"), *train_argv(text_data, tmp_path / "own", *flags, model=MODEL)]
    command = (
        [*torchrun(2), *command] if start == "by torchrun" else [*command, "--distributed-world-size", 2]
    )
    found = run_process(*command, cwd=tmp_path, timeout=200)
    assert found.exit_code == 0, found.output[-3000:]
    assert_same_run(found, tmp_path / "own", alone(MICRO_BATCHES, *FOUR_LAYERS), 1)
