"""lm-evaluation-harness with our model beside its own for transformers, on the tasks of tests/e2e/harness_tasks."""

import contextlib
import io
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.character_tokenizer import write_character_tokenizer
from tests.helpers.docs import documented_line
from tests.helpers.hf import build_hf_model
from tests.helpers.ranks import run_cli, run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TASKS = Path(__file__).parent / "harness_tasks"
NAMES = ["own_choice", "own_answer", "own_text"]
DEADLINE_SEC = 500.0  # imports of the harness, of transformers and of what they bring take most of it
Found = dict[str, Any]


def _offline(folder: Path) -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache")}


def _evaluate(rank: int, folder: Path, runs: list[tuple[str, dict[str, Any], int]]) -> list[Found]:
    """Run all tasks with each (model, its arguments, batch size): the answers to every request, and the results."""
    os.environ.update(_offline(folder))
    os.chdir(folder)
    sys.modules.setdefault("torchaudio", None)  # type: ignore[arg-type]  # as in tests/conftest.py
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from fairseq_moe.evaluation_harness import model  # noqa: F401

    manager = TaskManager(include_path="TASKS", include_defaults=False)
    found = []
    for name, arguments, batch_size in runs:
        done = simple_evaluate(
            model=name,
            model_args=arguments,
            tasks=NAMES,
            task_manager=manager,
            batch_size=batch_size,
            device="cpu",
            bootstrap_iters=0,
        )
        answers = {
            task: [
                sample["resps"]
                for sample in sorted(done["samples"][task], key=lambda sample: sample["doc_id"])
            ]
            for task in NAMES
        }
        found.append({"answers": answers, "results": {task: done["results"][task] for task in NAMES}})
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TASKS, and for two families HF-name, a Hugging Face directory, and MODEL-name, what from-hf makes of it."""
    from fairseq_moe.convert import from_hf

    folder = tmp_path_factory.mktemp("harness")
    shutil.copytree(TASKS, folder / "TASKS")
    for name, template in (("mixtral", False), ("deepseek_v3", True)):
        source = build_hf_model(name, folder / f"HF-{name}")
        write_character_tokenizer(source, template=template)
        from_hf(source, folder / f"MODEL-{name}")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[tuple[str, str, int], Found]:
    runs: list[tuple[str, dict[str, Any], int]] = []
    keys = []
    for name in ("mixtral", "deepseek_v3"):
        runs.append(("hf", {"pretrained": f"HF-{name}", "dtype": "float32"}, 1))
        keys.append((name, "hf", 1))
        for batch_size in (1, 4):
            runs.append(("fairseq_moe", {"path": f"MODEL-{name}"}, batch_size))
            keys.append((name, "ours", batch_size))
    return dict(zip(keys, run_ranks(_evaluate, 1, folder, runs, timeout=DEADLINE_SEC)[0], strict=True))


def _scores(found: Found, task: str) -> list[float]:
    """All log-likelihoods of a task in order, and beside them whether they were the greedy choice."""
    return [float(value) for value in _flat(found["answers"][task])]


def _flat(value: Any) -> list[Any]:
    return [part for item in value for part in _flat(item)] if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_scores_and_answers_are_those_of_transformers(
    name: str, batch_size: int, found: dict[tuple[str, str, int], Found]
) -> None:
    ours, theirs = found[name, "ours", batch_size], found[name, "hf", 1]
    assert len(_scores(theirs, "own_choice")) == 2 * (
        19 + 29
    )  # choices of all questions, each with its greedy mark
    assert _scores(ours, "own_choice") == pytest.approx(_scores(theirs, "own_choice"), abs=1e-4)
    assert ours["results"]["own_choice"]["acc,none"] == theirs["results"]["own_choice"]["acc,none"]
    answers = _flat(theirs["answers"]["own_answer"])
    assert _flat(ours["answers"]["own_answer"]) == answers
    assert len({*answers}) > 4 and len({*map(len, answers)}) > 2, "answers of some kinds"
    if (
        name == "mixtral"
    ):  # with a template transformers' tokenizer puts a second beginning token into whole texts
        assert _scores(ours, "own_text") == pytest.approx(_scores(theirs, "own_text"), abs=1e-4)


def test_the_documented_command_prints_the_result(
    folder: Path, found: dict[tuple[str, str, int], Found], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "MODEL").symlink_to("MODEL-mixtral")
    argv = documented_line("evaluate.md", "python -m fairseq_moe.evaluation_harness")
    result = run_cli(
        "tests.e2e.starts",
        ["fairseq_moe.evaluation_harness", *argv],
        function="as_main_module",
        cwd=folder,
        env=_offline(folder),
        timeout=DEADLINE_SEC,
    )
    assert result.exit_code == 0, result.output[-3000:]
    (accuracy,) = re.findall(r"^\|own_choice *\|.*\|acc *\|[^|]*\| *([\d.]+)\|", result.output, re.MULTILINE)
    expected = found["mixtral", "hf", 1]["results"]["own_choice"]["acc,none"]
    assert float(accuracy) == pytest.approx(expected, abs=1e-4)
    assert "have more than the 64 tokens that fit" in result.output


def test_a_choice_that_is_the_likeliest_is_marked(found: dict[tuple[str, str, int], Found]) -> None:
    marks = [_scores(of_run, "own_choice")[1::2] for of_run in found.values()]
    assert {*map(sum, marks)} >= {1.0}  # a letter is the likeliest, at least for one of the models


def _run_main(rank: int, folder: Path, commands: list[list[str]]) -> list[tuple[int, str]]:
    """Run the command several times in one process: exit codes, and what stderr says."""
    os.environ.update(_offline(folder))
    os.chdir(folder)
    from fairseq_moe.evaluation_harness.__main__ import main

    done = []
    for command in commands:
        sys.argv = ["evaluation_harness", *command]
        with contextlib.redirect_stderr(io.StringIO()) as said:
            code = main()
        done.append((code, said.getvalue()))
    return done


def test_what_cannot_be_done_is_one_sentence(folder: Path) -> None:
    command = shlex.split("--model fairseq_moe --include_path TASKS --tasks own_answer --model_args")
    sampled = ["--gen_kwargs", "do_sample=True,temperature=0.5,max_gen_toks=64,num_beams=4"]
    outputs = run_ranks(
        _run_main,
        1,
        folder,
        [
            [*command, "path=NONE"],
            [*command, "path=MODEL-mixtral", *sampled],
            [*command, "path=MODEL-mixtral", "--batch_size", "auto"],
            [*command, "path=MODEL-mixtral,max_length=65"],
        ],
        timeout=DEADLINE_SEC,
    )[0]
    assert [code for code, _ in outputs] == [2, 2, 2, 2]
    missing, wanted, batch, length = (
        re.findall(r"^fairseq_moe: error: (.*)$", said, re.MULTILINE)[0] for _, said in outputs
    )
    assert (
        missing == "there is no checkpoint NONE; path must be a directory that from-hf made, or a .pt file."
    )
    assert "num_beams=4 is not understood" in wanted and "not drawn at random" in wanted
    assert "asks for 64 new tokens, and the model reads 64 at once" in wanted
    assert "batch_size is auto, expected a number" in batch
    assert length == "max_length is 65, and the model has 64 positions."
