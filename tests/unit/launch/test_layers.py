"""Each layer counts over the one before it, for every key; all that cannot be read is told at once."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from fairseq_moe.errors import ConfigError
from fairseq_moe.launch.layers import collect, split_arguments
from fairseq_moe.launch.settings import SETTINGS
from fairseq_moe.launch.variables import aliases

LAYERS = ("recipe", "cluster", "run", "environment", "command line")
SELECTORS = ("recipe", "cluster", "run")
KEYS = [key for key in SETTINGS if key not in SELECTORS] + ["flags.lr", "env.NAME", "datasets.text"]
VARIABLES = {key: name for name, key in aliases().items()}


def words(key: str) -> Sequence[str]:
    """Two values that a key takes, as written."""
    setting = SETTINGS.get(key)
    if setting is None:
        return "a", "b"
    if setting.choices:
        return setting.choices[0], setting.choices[1]
    if key == "vocab_size":
        return "5", "6"
    if key in ("run_time", "setup"):
        return "01:00:00", "02:00:00"
    return {"number": ("1", "2"), "switch": ("true", "false")}.get(setting.kind, ("7", "8"))


def collected(folder: Path, values: dict[str, tuple[str, str]]) -> tuple[object, str]:
    """The value of a key, and its layer, where ``values`` has what layers say: the key and its value."""
    arguments, environ = [], {}
    for layer in LAYERS:
        key, word = values.get(layer, ("", ""))
        if layer in SELECTORS:
            path = folder / f"{layer}.yaml"
            first, dot, rest = key.partition(".")
            line = f"{first}:\n  {rest}: '{word}'\n" if dot else f"{key}: '{word}'\n"
            path.write_text(line if key else "{}")
            arguments.append(f"{layer}={path}")
        elif layer == "environment" and key:
            environ[VARIABLES[key]] = word
        elif key:
            arguments.append(f"{key}={word}")
    (key,) = {key for key, _ in values.values()}
    layered = collect(arguments, environ)
    return layered[key], layered.origins[key]


@pytest.mark.parametrize("key", KEYS)
def test_each_layer_is_overridden_by_the_next(key: str, tmp_path: Path) -> None:
    below, above = words(key)
    there = [layer for layer in LAYERS if layer != "environment" or key in VARIABLES]
    alone = {word: collected(tmp_path, {"recipe": (key, word)})[0] for word in (below, above)}
    assert alone[below] != alone[above]
    for lower, upper in pairwise(there):
        value, origin = collected(tmp_path, {lower: (key, below), upper: (key, above)})
        assert value == alone[above]
        assert origin.startswith(upper)
        assert collected(tmp_path, {lower: (key, below)})[1].startswith(lower)


def test_what_no_layer_says_is_built_in() -> None:
    layered = collect([], {})
    assert {layered.origins[key] for key in SETTINGS} == {"built in"}
    assert all(layered[key] == setting.default for key, setting in SETTINGS.items())


def test_an_origin_names_the_file_and_the_variable() -> None:
    layered = collect(["DeepSeek-V3", "pp=8"], {"TP": "2", "MBS": ""})
    found = {key: layered.origins[key] for key in ("recipe", "pp", "tp", "mbs", "flags.lr")}
    assert found == {
        "recipe": "command line",
        "pp": "command line",
        "tp": "environment TP",
        "mbs": "recipe deepseek_v3.yaml",
        "flags.lr": "recipe deepseek_v3.yaml",
    }


def test_nothing_takes_a_value_back() -> None:
    layered = collect(["deepseek_v3", "pp_first=", "flags.lr="], {})
    assert layered["pp_first"] is None
    assert "lr" not in layered.map("flags")
    assert "min-lr" in layered.map("flags")


def test_a_run_names_its_recipe_and_cluster(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("recipe: laptop\nmbs: 3\n")
    layered = collect([f"run={run}"], {})
    assert (layered["model"], layered["mbs"]) == ("Laptop", 3)
    assert collect([f"run={run}", "recipe=mixtral_8x7b"], {})["model"] == "Mixtral-8x7B"


def test_flags_are_spelled_in_any_way() -> None:
    layered = collect(["flags.min_lr=1", "flags.--max-update=2", "--", "--lr", "a b"], {})
    assert layered.map("flags") == {"min-lr": "1", "max-update": "2"}
    assert layered.raw_flags == ("--lr", "a b")


def test_only_the_first_separator_splits() -> None:
    assert split_arguments(["laptop", "--", "--", "x=1"]) == ({"recipe": "laptop"}, ("--", "x=1"))


def refusal(arguments: list[str], environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        collect(arguments, environ or {})
    return raised.value.problems


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("gsb=1", "there is no key 'gsb'; did you mean gbs?"),
        ("TP=2", "there is no key 'TP'; did you mean tp?"),
        ("NNODES=2", "there is no key 'NNODES'; did you mean nodes?"),
        ("qqqqqq=1", "there is no key 'qqqqqq'; --list shows all."),
        ("flags=1", "'flags' is a map; write flags.NAME=value"),
        ("tp=two", "tp is 'two', expected a whole number."),
        ("tp=0", "tp is 0, expected at least 1."),
        ("mode=slurm", "mode is 'slurm', expected one of sbatch, interactive, local."),
        ("requeue=maybe", "requeue is 'maybe', expected true or false."),
        ("comment=${HOME}", "${VARIABLE} is filled in only in paths and in env"),
        ("output_path=${NOT_THERE}/a", "the environment has no NOT_THERE; set it."),
        ("output_path=$(date)", "no shell is run"),
        ("env.A=`date`", "no shell is run"),
        ("output_path=${", "no shell is run"),
        ("env.A=${HOME:-x}", "no shell is run"),
        ("output_path=~/runs", "write ${HOME} in place of ~."),
        ("container_mounts=/a,~/b", "write ${HOME} in place of ~."),
        (f"gbs={'9' * 19}", "gbs is a number of 19 digits, expected at most 18."),
        (f"gbs={'9' * 5000}", "gbs is a number of 5000 digits, expected at most 18."),
        ("vocab_size=4", "vocab_size is 4, expected at least 5."),
        (f"run={'a' * 300}.yaml", "cannot be read (File name too long)"),
        ("srun_args='a", "a quote is not closed"),
        ("recipe=deepseek_v4", "there is no recipe 'deepseek_v4'; did you mean deepseek_v3?"),
        ("recipe=there/is/none.yaml", "there is no such file"),
        ("run=laptop", "expected the path of a .yaml file"),
        ("--lr", "flags of fairseq-train come after a --"),
    ],
)
def test_a_bad_word_gets_one_sentence(word: str, sentence: str) -> None:
    (problem,) = refusal(["laptop", word] if not word.startswith("recipe") else [word])
    assert sentence in problem


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("gsb: 1\nMODEL_ARGS:\n  --lr: 1\nrun_time: 1:20:00\n")
    problems = refusal([f"recipe={recipe}", "tp=x"], {"PP": "y", "PR": "mxfp8"})
    assert [problem.split(":")[0] for problem in problems] == [
        "PR=mxfp8 cannot be honoured",
        *["recipe mine.yaml"] * 3,
        "environment PP",
        "command line",
    ]
    assert "write flags" in problems[2]
    assert "in quotes" in problems[3]


def test_an_empty_word_names_no_file() -> None:
    layered = collect(["", "cluster=", "run="], {"MODEL": "laptop"})
    assert (layered["recipe"], layered["cluster"], layered["run"]) == (None, None, None)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "wandb_mode: off\n",
            "wandb_mode is false (YAML reads on, off, yes and no so, too), expected one of online",
        ),
        ("flags:\n  lr: 1\n  --lr: 2\n", "flags.lr is given twice; leave one out."),
        ("flags:\n  lr: 1\nflags.lr: 2\n", "flags.lr is given twice; leave one out."),
        ("a: &x [*x]\n", "it is nested too deeply, or holds itself."),
        ("[" * 3000, "it is nested too deeply, or holds itself."),
    ],
)
def test_a_file_is_refused_in_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    (problem,) = refusal([f"run={path}"])
    assert "odd.yaml" in problem
    assert sentence in problem


def test_a_map_may_be_empty(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("flags:\nenv:\n")
    assert collect([f"run={path}"], {}).map("flags") == {}


@pytest.mark.parametrize("text", ["- a\n", "a: [1\n", "b: ${oops\n"])
def test_a_file_that_is_no_map_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    (problem,) = refusal([f"cluster={path}"])
    assert "bad.yaml" in problem


def test_variables_are_filled_in_paths_and_env(tmp_path: Path) -> None:
    cluster = tmp_path / "mine.yaml"
    cluster.write_text(
        "container_mounts: ['${HOME}/data:/data']\nenv:\n  A: ${HOME}-x\ndatasets:\n  d: ${HOME}/d\n"
    )
    layered = collect([f"cluster={cluster}", "data_path=${HOME}/a b"], {"HOME": "/h"})
    assert layered["container_mounts"] == ("/h/data:/data",)
    assert layered.map("env") == {"A": "/h-x"}
    assert layered.map("datasets") == {"d": "/h/d"}
    assert layered["data_path"] == "/h/a b"
