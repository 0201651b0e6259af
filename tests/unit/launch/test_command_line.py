"""fairseq-moe-launch lists, says where values come from, prints dry runs, and refuses in sentences with exit code 2."""

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from fairseq_moe.launch.command import training_command
from fairseq_moe.launch.files import names
from fairseq_moe.launch.layers import Layered, collect
from fairseq_moe.launch.settings import SETTINGS
from fairseq_moe.launch.sizes import sizes_of
from fairseq_moe.launch.written import origins_table, resolved_yaml
from tests.helpers.ranks import run_ranks

Printed = tuple[int, str, str]
CASES: dict[str, tuple[list[str], dict[str, str]]] = {
    "list": (["--list"], {}),
    "origins": (
        ["laptop", "mbs=2", "--show-origin", "--", "--seed", "3"],
        {"GBS": "4", "MEGATRON_PATH": "/m"},
    ),
    "dry run": (["laptop", "env.A=b c"], {"DRY_RUN": "1", "WANDB_API_KEY": "s3cret"}),
    "built": (["shrunk_8x7b"], {"DRY_RUN": "2"}),
    "refused": (["laptop", "gsb=1", "tp=x"], {}),
    "unsorted": (["laptop", "--show-origin", "mbs=2", "gbs=4"], {}),
    "misplaced": (["laptop", "--lr", "3"], {}),
    "elsewhere": (["laptop", "data_path=/no/data"], {"DRY_RUN": "1"}),
    "nowhere": (["laptop", "data_path=/no/data", "vocab_size="], {"DRY_RUN": "1"}),
    "checked": (["laptop", "ep=3", "gbs=7"], {"DRY_RUN": "1"}),
}


def printed(rank: int) -> dict[str, Printed]:
    """Exit code, output and errors of each case."""
    from fairseq_moe.launch.command_line import main

    before = dict(os.environ)
    found = {}
    for name, (arguments, environ) in CASES.items():
        os.environ.clear()
        os.environ.update({key: before[key] for key in ("PATH", "HOME") if key in before} | environ)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
        found[name] = (code, out.getvalue(), err.getvalue())
    return found


@pytest.fixture(scope="module")
def results() -> dict[str, Printed]:
    found: dict[str, Printed] = run_ranks(printed, 1, timeout=200.0)[0]
    return found


pytestmark = pytest.mark.timeout(250)


def test_list_has_every_recipe_and_key(results: dict[str, Printed]) -> None:
    code, out, err = results["list"]
    words = {line.split()[0] for line in out.splitlines() if line.startswith("  ")}
    assert (code, err) == (0, "")
    assert words == {
        *names("recipe"),
        *names("cluster"),
        *SETTINGS,
        "flags.NAME",
        "env.NAME",
        "datasets.NAME",
    }


def test_origins_name_layer_and_variable(results: dict[str, Printed]) -> None:
    code, out, err = results["origins"]
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert code == 0
    assert rows["mbs"] == ["2", "command", "line"]
    assert rows["gbs"] == ["4", "environment", "GBS"]
    assert rows["seq_len"] == ["128", "recipe", "laptop.yaml"]
    assert rows["--"] == ["--seed", "3", "command", "line"]
    assert "pp" not in rows
    assert (
        err
        == "fairseq-moe-launch: MEGATRON_PATH is ignored: there is no Megatron checkout here; this package trains.\n"
    )


def test_a_dry_run_prints_all_and_no_key(results: dict[str, Printed]) -> None:
    code, out, err = results["dry run"]
    assert (code, err) == (0, "")
    titles = [
        line
        for line in out.splitlines()
        if line in ("# settings", "# origins", "# plan", "# job script", "# command")
    ]
    assert titles == ["# settings", "# origins", "# plan", "# job script", "# command"]
    assert out.count("fairseq-train") >= 2
    assert "--wandb-project" in out
    assert "s3cret" not in out


def test_a_second_kind_of_dry_run_builds_every_stage(results: dict[str, Printed]) -> None:
    code, out, err = results["built"]
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.partition("# built")[2].splitlines() if line.startswith("rank ")]
    assert [row[1] for row in rows] == ["0", "2", "4", "6"]  # of four stages of two ranks
    assert all(planned == built for _, _, planned, built in rows)


def test_data_that_lie_on_the_cluster_are_planned_with_the_words_given(results: dict[str, Printed]) -> None:
    code, out, _ = results["elsewhere"]
    assert (code, "/no/data" in out) == (0, True)
    assert "transformer_lm_gpt: 1,902,208 parameters" in out
    code, out, err = results["nowhere"]
    assert (code, out) == (2, "")
    assert "data_path is '/no/data', which has no dict.txt here" in err


def test_problems_are_a_sentence_each_and_code_2(results: dict[str, Printed]) -> None:
    code, out, err = results["refused"]
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "fairseq-moe-launch: command line: there is no key 'gsb'; did you mean gbs?",
        "fairseq-moe-launch: command line: tp is 'x', expected a whole number.",
    ]
    code, out, err = results["checked"]
    assert (code, out) == (2, "")
    assert "gbs is 7" in err
    assert "--expert-model-parallel-size" in err


def test_words_may_stand_on_both_sides_of_an_option(results: dict[str, Printed]) -> None:
    code, out, _ = results["unsorted"]
    assert code == 0
    assert [line.split()[1] for line in out.splitlines() if line.split()[0] == "mbs"] == ["2"]


def test_flags_of_training_that_come_too_early_are_named(results: dict[str, Printed]) -> None:
    code, _, err = results["misplaced"]
    assert code == 2
    assert "'--lr' is no key=value; flags of fairseq-train come after a --." in err


def _command(layered: Layered) -> Sequence[str]:
    return training_command(layered, sizes_of(layered), run_dir=Path("/r"), has_key=False)


@pytest.mark.parametrize("recipe", names("recipe"))
def test_resolved_settings_are_a_recipe_of_the_same_command(recipe: str, tmp_path: Path) -> None:
    words = ["env.A=b: 'c'", "run_time=1:20:00", "flags.x=false", "profile=torch", "setup=a\nb"]
    layered = collect([recipe, *words], {"TP": "2"})
    path = tmp_path / "resolved.yaml"
    path.write_text(resolved_yaml(layered))
    again = collect([f"recipe={path}"], {})
    apart = ("recipe",)
    assert {key: value for key, value in again.values.items() if key not in apart} == {
        key: value for key, value in layered.values.items() if key not in apart
    }
    assert sorted(_command(again)) == sorted(_command(layered))


def test_origins_of_nothing_are_nothing() -> None:
    assert origins_table(collect([], {})) == ""
