"""fairseq-train on tensor and context ranks: parameters, logs and expert loads of one process, at each mix of axes."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import DENSE, eval_lm, json_lines, perplexity, train
from tests.helpers.axes import C2, C2T2X2, GPT, PAIRS, T2, ZERO1, ZERO3
from tests.helpers.checkpoints import contents
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


@pytest.fixture(scope="module")
def alone(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``alone(data)``: the run of one process with the micro-batches of so many data ranks, and its directory."""

    @functools.cache
    def run(data: int) -> tuple[CommandResult, Path]:
        folder = tmp_path_factory.mktemp(f"alone-{data}")
        return train(text_data, folder, *UPDATES, "--update-freq", data, model=MODEL), folder

    return run


def assert_same_records(found: CommandResult, expected: CommandResult, kind: str) -> None:
    for own, wanted in zip(json_lines(found, kind), json_lines(expected, kind), strict=True):
        assert own.keys() == wanted.keys()
        for name, value in wanted.items():
            is_speed = "time" in name or "wall" in name or name.endswith(("ups", "wps"))
            # Of all data ranks together, whose steps are averaged.
            is_of_a_step = name.endswith(("wpb", "bsz", "violation")) or "_load_expert" in name
            is_of_a_step = is_of_a_step and kind == "valid"
            if not (is_speed or is_of_a_step or name == "gb_free"):
                # Printed with three digits behind the point.
                assert float(own[name]) == pytest.approx(float(value), rel=2e-6, abs=1.1e-3), (kind, name)


def loads(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "moe_load.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mix", MIXES)
def test_the_command_trains_as_one_process_does(
    mix: str, alone: Any, text_data: Path, tmp_path: Path
) -> None:
    world_size, data, flags = MIXES[mix]
    expected, folder = alone(data)
    found = train(text_data, tmp_path, *UPDATES, *flags, world_size=world_size, model=MODEL)
    for kind in ("train_inner", "valid"):
        assert_same_records(found, expected, kind)
    assert all("train_inner" not in output for output in found.outputs[1:])  # rank 0 speaks
    assert loads(tmp_path) == loads(folder)
    own, wanted = (contents(path / "checkpoint_last.pt") for path in (tmp_path, folder))
    assert own.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if name.startswith("model/"):
            assert float((own[name].double() - tensor.double()).abs().max()) <= 1e-5, name
    if mix == "C2T2E2X2":
        scores = [perplexity(eval_lm(text_data, path / "checkpoint_last.pt")) for path in (tmp_path, folder)]
        assert scores[0] == pytest.approx(scores[1], abs=0.011)
