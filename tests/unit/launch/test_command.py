"""Settings become the words of a command: which flags, which count, what each rank's environment has."""

import os
import shlex
import subprocess
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fairseq_moe.launch.command import environment_of, profile_of, run_name, training_command
from fairseq_moe.launch.job import Profile
from fairseq_moe.launch.layers import Layered, collect
from fairseq_moe.launch.render import command_text
from fairseq_moe.launch.sizes import sizes_of
from tests.helpers.ranks import REPOSITORY


def settings(line: str, **environ: str) -> Layered:
    """Layers of a command line, as a shell would split it."""
    return collect(shlex.split(line), environ)


def flags(line: str, **environ: str) -> dict[str, Any]:
    """The flags of the command that a command line gives: a value, several, or True."""
    words = command(settings(line, **environ))
    found: dict[str, Any] = {}
    for name, *values in sorted(pairs(words)):
        found[name] = True if not values else values[0] if len(values) == 1 else values
    return found


def command(layered: Layered, *, has_key: bool = False) -> tuple[str, ...]:
    return training_command(layered, sizes_of(layered), run_dir=Path("/runs/it"), has_key=has_key)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("tp=2", {"--tensor-model-parallel-size": "2", "--sequence-parallel": True}),
        ("pp=4", {"--pipeline-model-parallel-size": "4"}),
        ("cp=2", {"--context-parallel-size": "2"}),
        ("ep=4", {"--expert-model-parallel-size": "4"}),
        ("etp=2", {"--expert-tensor-parallel-size": "2"}),
        ("vpp=4", {"--num-virtual-stages-per-pipeline-rank": "4"}),
        ("layers_per_vp=2", {"--num-layers-per-virtual-pipeline-stage": "2"}),
        ("pp_first=3", {"--decoder-first-pipeline-num-layers": "3"}),
        ("pp_last=3", {"--decoder-last-pipeline-num-layers": "3"}),
        ("num_layers=3", {"--decoder-layers": "3"}),
        ("mbs=3", {"--batch-size": "3", "--required-batch-size-multiple": "1"}),
        ("mbs=2 gbs=64", {"--batch-size": "2", "--required-batch-size-multiple": "1", "--update-freq": "4"}),
        ("seq_len=32", {"--tokens-per-sample": "32"}),
        ("precision=fp16", {"--bf16": None, "--memory-efficient-fp16": True}),
        ("precision=fp32", {"--bf16": None}),
        ("precision=fp8", {"--moe-fp8": "native"}),
        ("dispatcher=allgather", {"--moe-token-dispatcher-type": "allgather"}),
        ("dispatcher=deepep", {"--moe-token-dispatcher-type": "alltoall"}),
        ("grouped_gemm=true", {"--moe-grouped-gemm": True}),
        ("load_path=/a.pt", {"--finetune-from-model": "/a.pt"}),
        ("load_path=/a.pt pretrain=1", {}),
        ("vocab_size=1000", {"--dict-size": "996"}),
        ("gpus_per_node=0", {"--cpu": True}),
        ("mode=local ranks_per_node=2", {"--cpu": True, "--distributed-world-size": "2"}),
        ("mode=interactive", {}),
        ("container=pyxis", {"--user-dir": "fairseq_moe"}),
        ("flags.seed=3", {"--seed": "3"}),
        ("flags.a=true flags.b=false", {"--a": True}),
        (
            "profile=torch profile_steps=3,4 profile_ranks=0,2",
            {
                "--profile-step-start": "3",
                "--profile-step-end": "4",
                "--profile-ranks": ["0", "2"],
                "--use-pytorch-profiler": True,
            },
        ),
        ("profile=nsys", {"--profile-step-start": "10", "--profile-step-end": "11", "--profile-ranks": "0"}),
        ("wandb_mode=offline", {"--wandb-project": "fairseq-moe"}),
    ],
)
def test_a_setting_becomes_flags(line: str, expected: dict[str, Any]) -> None:
    plain, found = flags(""), flags(line)
    changed = {name: found.get(name) for name in plain.keys() | found if plain.get(name) != found.get(name)}
    assert changed == expected


def test_text_takes_the_place_of_the_synthetic_task() -> None:
    synthetic = flags("vocab_size=8")
    assert (synthetic["--task"], synthetic["--disable-validation"]) == ("dummy_lm", True)
    words = command(settings("vocab_size=8 data_path='/a b' tokenizer_model=/t.json"))
    assert words[:2] == ("fairseq-train", "/a b")
    of_text = dict(pair for pair in pairs(words) if len(pair) == 2)
    assert of_text["--task"] == "language_modeling"
    assert of_text["--hf-tokenizer-json"] == "/t.json"
    assert not {"--dict-size", "--disable-validation"} & of_text.keys()
    assert command(settings("datasets.wiki=/w dataset=wiki"))[1] == "/w"


@pytest.mark.parametrize(
    ("line", "environ", "batch"),
    [
        ("mbs=2", {}, "2"),
        ("flags.batch-size=3", {"MBS": "2"}, "3"),  # the command line is above the environment
        ("mbs=2 flags.batch_size=3", {}, "3"),
        ("mbs=2", {"TRAINING_PARAMS": "--batch-size 7"}, "2"),
    ],
)
def test_the_higher_layer_counts_between_a_flag_and_a_setting(
    line: str, environ: dict[str, str], batch: str
) -> None:
    words = command(settings(line, **environ))
    last = len(words) - 1 - words[::-1].index("--batch-size")
    assert words[last + 1] == batch


def test_a_setting_of_a_higher_layer_beats_a_flag_of_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("flags: {batch-size: 5}\n")
    assert flags(f"recipe={recipe}")["--batch-size"] == "5"
    assert flags(f"recipe={recipe}", MBS="2")["--batch-size"] == "2"


# Every flag that is derived from settings, given raw after them.
@pytest.mark.parametrize(
    "raw", ["--batch-size 9", "--bf16", "--update-freq 3", "--save-dir /x", "--arch a --arch b"]
)
def test_raw_flags_come_last_of_all(raw: str) -> None:
    line = "mixtral_8x7b mbs=1 flags.batch-size=2 profile=torch"
    assert command(settings(f"{line} -- {raw}")) == (*command(settings(line)), *raw.split())


def test_training_params_come_first() -> None:
    words = command(settings("mixtral_8x7b", TRAINING_PARAMS="--lr 5"))
    assert words[1:3] == ("--lr", "5")
    assert words.index("--lr") < len(words) - 1 - words[::-1].index("--lr")


def test_stages_of_a_recipe_go_with_its_pipeline() -> None:
    assert "--decoder-first-pipeline-num-layers" in flags("deepseek_v3")
    without = flags("deepseek_v3 pp=1").keys() | flags("mixtral_8x7b pp=1").keys()
    assert [name for name in without if "pipeline" in name] == []
    assert (
        flags("deepseek_v3 pp=1 pp_first=3")["--decoder-first-pipeline-num-layers"] == "3"
    )  # and is refused


def test_words_survive_a_shell() -> None:
    odd = "a 'b' \"c\" $HOME `d` \\ ;&|*\n"
    words = command(collect(["laptop", f"comment={odd}", "--", "--x", odd], {}))
    assert words[-1] == odd
    line = f"printf '%s\\0' {command_text(words)}"
    printed = subprocess.run(
        ["bash", "-c", line], capture_output=True, check=True, timeout=60
    ).stdout.decode()
    assert tuple(printed.split("\0")[:-1]) == words


def test_a_run_is_named_as_modelzoo_names_it() -> None:
    layered = settings("mixtral_8x22b comment=try")
    assert run_name(layered) == "Mixtral-8x22B-TP2PP8EP8CP1VPP1-MBS1GBS256-try"
    assert run_name(settings("mixtral_8x22b run_name=mine comment=try")) == "mine"


def environment(line: str, *, has_key: bool = False) -> dict[str, str]:
    layered = settings(line)
    return environment_of(layered, sizes_of(layered), name="it", has_key=has_key)


def test_one_connection_where_axes_within_a_batch_meet_on_gpus() -> None:
    one = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert environment("tp=2") == environment("cp=2") == one
    assert (
        environment("pp=2 ep=2")
        == environment("tp=2 gpus_per_node=0")
        == environment("cp=2 mode=local")
        == {}
    )
    assert environment("tp=2 env.CUDA_DEVICE_MAX_CONNECTIONS=32") == {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}


def test_weights_and_biases_are_off_without_a_key() -> None:
    layered = settings("laptop")
    assert environment("laptop") == {}
    assert "--wandb-project" not in command(layered)
    assert environment("laptop", has_key=True) == {"WANDB_NAME": "it", "WANDB_MODE": "online"}
    assert "--wandb-project" in command(layered, has_key=True)
    assert "--wandb-project" not in command(settings("laptop wandb_mode=disabled"), has_key=True)


def test_a_cpu_is_watched_by_torch() -> None:
    found = {
        line: profile_of(settings(line), sizes_of(settings(line)))
        for line in ("profile=1", "mode=local profile=1")
    }
    assert found["profile=1"] == Profile(profiler="nsys")
    assert found["mode=local profile=1"] == Profile(profiler="torch")


def pairs(words: Sequence[str]) -> set[tuple[str, ...]]:
    """Flags with their values, in no order."""
    starts = [index for index, word in enumerate(words) if word.startswith("--")]
    return {tuple(words[start:end]) for start, end in pairwise([*starts, len(words)])}


@pytest.mark.parametrize(
    ("recipe", "script"),
    [("branch_single_node", "train_single_node.sh"), ("branch_multi_node", "train_multi_node.slurm")],
)
def test_the_branchs_commands_are_recipes(recipe: str, script: str) -> None:
    """The scripts' commands are those of the branch's README, flag by flag (tests/unit/test_scripts.py)."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    printed = subprocess.run(
        ["bash", str(REPOSITORY / "scripts" / script)],
        env={**environment, "DRY_RUN": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    words = shlex.split(printed)
    expected = pairs(words[words.index("fairseq-train") :])
    found = pairs(command(settings(recipe)))
    added = {"--required-batch-size-multiple", "--save-dir"}
    assert {pair[0] for pair in found - expected} == added
    assert expected - found == set()
