"""Settings that do not go together get a sentence each, all at once; secrets are written nowhere."""

import shlex

import pytest

from fairseq_moe.launch.checks import secret_problems, setting_notes, setting_problems
from fairseq_moe.launch.files import names
from fairseq_moe.launch.layers import Layered, collect
from fairseq_moe.launch.sizes import sizes_of


def layers(line: str) -> Layered:
    return collect(shlex.split(line), {})


def problems(line: str, *, has_key: bool = False) -> list[str]:
    layered = layers(line)
    return setting_problems(layered, sizes_of(layered), has_key=has_key)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("", "no model is named"),
        (
            "mixtral_8x7b nodes=3 gbs=480 pp=5",
            "3 nodes x 8 ranks are 24, expected a multiple of tp 1 x pp 5 x cp 1 = 5",
        ),
        ("mixtral_8x7b gbs=250", "gbs is 250, expected a multiple of mbs 1 x 16 data ranks = 16."),
        ("arch=a gbs=8", "gbs is 8, of micro-batches without a size; give mbs."),
        ("arch=a train_samples=8", "train_samples counts sequences, of which an update has gbs"),
        ("mixtral_8x7b train_samples=8", "train_samples is 8, which is less than an update's gbs 256"),
        ("arch=a vpp=2 layers_per_vp=3", "vpp and layers_per_vp both say"),
        ("laptop precision=fp8", "precision fp8 needs GPUs"),
        ("laptop pretrain=0", "pretrain is false, and there is no load_path"),
        ("laptop wandb_mode=online", "the environment has no WANDB_API_KEY"),
        ("laptop device=h1000", "device is 'h1000', expected one of h100,"),
        ("laptop profile_steps=1", "expected a first and a last update"),
        ("laptop dataset=wiky datasets.wiki=/w", "did you mean wiki?"),
        ("laptop dataset=wiki", "give data_path, or datasets in the cluster's file"),
    ],
)
def test_each_gets_a_sentence(line: str, sentence: str) -> None:
    (problem,) = problems(line)
    assert sentence in problem


@pytest.mark.parametrize("recipe", names("recipe"))
def test_recipes_have_none(recipe: str) -> None:
    assert problems(recipe) == []


def test_all_are_told_at_once() -> None:
    assert len(problems("laptop gbs=7 precision=fp8 pretrain=0 wandb_mode=online")) == 4


def test_a_key_is_enough_for_online() -> None:
    assert problems("laptop wandb_mode=online", has_key=True) == []


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("dispatcher=hybridep", "dispatcher hybridep is alltoall here"),
        ("grouped_gemm=0", "grouped_gemm false does nothing"),
        (
            "cp=4 seq_len=33",
            "seq_len 33 is no multiple of 2 x cp 4: each sequence is filled up to 40 positions.",
        ),
        ("load_path=/a pretrain=1", "load_path is not read"),
        ("data_path=/a dataset=b", "dataset b is not looked up"),
        ("tokenizer_model=/a", "tokenizer_model does nothing on synthetic data"),
    ],
)
def test_what_does_nothing_is_said(line: str, sentence: str) -> None:
    (note,) = setting_notes(layers(line))
    assert note.startswith(sentence)
    assert list(setting_notes(layers("cp=4 seq_len=32"))) == []


def test_secrets_are_not_written() -> None:
    environ = {"WANDB_API_KEY": "s3cret", "OTHER": "x"}
    assert secret_problems(layers("laptop"), ("--a", "b"), environ) == []
    found = secret_problems(layers("laptop env.WANDB_API_KEY=s3cret"), ("--key=s3cret",), environ)
    assert len(found) == 2
    assert "s3cret" not in " ".join(found)
