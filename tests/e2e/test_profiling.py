"""Profiles of real runs: the updates and ranks that were asked for are in the traces, and no others."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import DENSE, train, train_argv
from tests.helpers.ranks import CommandResult, run_cli

pytestmark = pytest.mark.timeout(300)

MEGATRON = [
    *(*DENSE, "--num-experts", 4, "--moe-ffn-hidden-size", 32, "--moe-layer-freq", "[0,1]"),
    *("--criterion", "moe_cross_entropy", "--moe-gate-loss-wt", 1),
]
ENDING = ".pt.trace.json"


def window(first: int, last: int) -> list[Any]:
    return ["--use-pytorch-profiler", "--profile-step-start", first, "--profile-step-end", last]


def traces(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The events of each trace, by the file's name."""
    return {
        path.name.removesuffix(ENDING): json.loads(path.read_text())["traceEvents"]
        for path in sorted((folder / "profile").iterdir())
    }


def updates_in(events: list[dict[str, Any]]) -> list[str]:
    return sorted({event["name"] for event in events if re.match(r"update \d", event.get("name", ""))})


def tables(output: str) -> list[str]:
    return re.findall(r"most expensive operations of (.*):$", output, re.MULTILINE)


def test_trace_and_table_of_one_rank(text_data: Path, tmp_path: Path) -> None:
    result = train(text_data, tmp_path, "--no-save", "--disable-validation", *window(2, 3))
    [(name, events)] = traces(tmp_path).items()
    assert name == "rank-0.updates-2-3"
    assert updates_in(events) == ["update 2", "update 3"]
    operations = [event for event in events if event.get("name") == "aten::mm"]
    assert all(event["dur"] >= 0 for event in operations) and operations
    assert tables(result.output) == ["updates 2 to 3 on rank 0"]
    assert re.search(r"^ +aten::\w+ +\d", result.output, re.MULTILINE)


def test_ranks_of_a_pipeline_that_stops_inside_the_window(text_data: Path, tmp_path: Path) -> None:
    """--max-update is 4: the last two updates of the window never come."""
    flags = ["--pipeline-model-parallel-size", 2, "--update-freq", 2, "--profile-ranks", 0, 1]
    result = train(text_data, tmp_path, "--no-save", *flags, *window(3, 6), world_size=2, model=MEGATRON)
    found = traces(tmp_path)
    assert sorted(found) == ["rank-0.updates-3-4", "rank-1.updates-3-4"]
    for number, events in enumerate(found.values()):
        assert updates_in(events) == ["update 3", "update 4"]
        assert tables(result.outputs[number]) == [f"updates 3 to 4 on rank {number}"]


def failing(data: Path, folder: Path, fault: str, *flags: Any, **kwargs: Any) -> CommandResult:
    argv = train_argv(data, folder, "--no-save", *flags)
    return run_cli("fairseq_cli.train", argv, env={"FAIRSEQ_MOE_FAULT": fault}, **kwargs)


@pytest.mark.parametrize(
    ("fault", "flags"),
    [
        pytest.param("train.forward@0@3=raise", [], id="in an update"),
        pytest.param("valid.forward@0@1=raise", ["--validate-interval-updates", 2], id="in validation"),
    ],
)
def test_run_that_fails_inside_the_window_writes_its_trace(
    fault: str, flags: list[Any], text_data: Path, tmp_path: Path
) -> None:
    result = failing(text_data, tmp_path, fault, *flags, *window(2, 9))
    assert result.exit_code != 0 and "injected at" in result.output
    [name] = traces(tmp_path)
    assert name == ("rank-0.updates-2-3" if "train" in fault else "rank-0.updates-2-2")


def test_only_the_rank_that_is_named_is_profiled(text_data: Path, tmp_path: Path) -> None:
    """The other fails in the window, so that this one ends by an exchange that never comes."""
    flags = ["--profile-ranks", 1, *window(1, 9)]
    result = failing(text_data, tmp_path, "train.forward@0@2=raise", *flags, world_size=2)
    assert result.exit_code != 0
    assert sorted(traces(tmp_path)) == ["rank-1.updates-1-2"]
    assert tables(result.outputs[0]) == []


def test_nsys_on_a_cpu_ends_the_command_with_one_sentence(text_data: Path, tmp_path: Path) -> None:
    flags = ["--profile-step-start", 2, "--profile-step-end", 3]
    result = run_cli("fairseq_cli.train", train_argv(text_data, tmp_path, *flags))
    assert result.exit_code == 2
    assert "marks updates for nsys, which needs a GPU" in result.output and "Traceback" not in result.output
    assert not (tmp_path / "profile").exists()
