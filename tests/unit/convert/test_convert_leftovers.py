"""Tensors of old releases that follow from config.json: checked, left out and noted; anything else is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fairseq_moe.convert import from_hf, to_hf
from fairseq_moe.errors import CheckpointError
from tests.helpers.hf import import_transformers

Models = Callable[..., Path]
ATTENTION = "model.layers.2.self_attn."


def _with(source: Path, target: Path, tensors: dict[str, Tensor]) -> Path:
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    extra = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
    return target


def _rotary(source: Path, positions: int) -> tuple[Tensor, Tensor, Tensor]:
    """transformers' frequencies, cosines and sines."""
    model = import_transformers().AutoModelForCausalLM.from_pretrained(source).model
    frequencies = model.rotary_emb.inv_freq
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies).repeat(1, 2)
    factor = model.rotary_emb.attention_scaling
    return frequencies, angles.cos() * factor, angles.sin() * factor


def _masks() -> dict[str, Tensor]:
    causal = torch.ones(64, 64).tril()[None, None]
    return {
        "model.layers.0.self_attn.bias": causal.bool(),
        "model.layers.1.self_attn.bias": causal,
        "model.layers.2.attn.bias": causal.to(torch.uint8),
        "model.layers.0.attn.masked_bias": torch.tensor(-1e4),
        "model.layers.1.self_attn.masked_bias": torch.tensor([-1e9]),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2", "minimax_m2"])
def test_what_follows_from_the_config_is_left_out_with_a_note(
    name: str, dtype: torch.dtype, hf_model: Models, tmp_path: Path
) -> None:
    frequencies, cosines, sines = _rotary(hf_model(name), 64)
    leftovers = {"model.rotary_emb.inv_freq": frequencies.to(dtype), **_masks()}
    for layer in range(3):
        prefix = f"model.layers.{layer}.self_attn.rotary_emb."
        leftovers[f"{prefix}inv_freq"] = frequencies.to(dtype)
        leftovers[f"{prefix}cos_cached"] = cosines.to(dtype)
        leftovers[f"{prefix}sin_cached"] = sines.to(dtype)[None, None]
    plain = from_hf(hf_model(name), tmp_path / "plain")
    done = from_hf(_with(hf_model(name), tmp_path / "source", leftovers), tmp_path / "ours")
    assert (done.digest, done.num_tensors, done.num_bytes) == (
        plain.digest,
        plain.num_tensors,
        plain.num_bytes,
    )
    [note] = done.notes
    assert note.startswith(f"{len(leftovers)} tensors of older releases, which follow from config.json, ")
    assert note.endswith(f"left out: {', '.join(sorted(leftovers)[:5])} and {len(leftovers) - 5} more.")
    back = to_hf(tmp_path / "ours", tmp_path / "back")
    assert "are the same as those of the model" in back.notes[0]
    one, other = (load_file(path / "model.safetensors") for path in (tmp_path / "back", hf_model(name)))
    assert one.keys() == other.keys()


@pytest.mark.parametrize(
    "change",
    [
        lambda frequencies: torch.ones(4),
        lambda frequencies: frequencies * 1.0001,
        lambda frequencies: (frequencies * 1.02).bfloat16(),
    ],
)
def test_other_frequencies_than_the_config_implies_are_left_out_as_transformers_does_and_noted(
    change: Callable[[Tensor], Tensor], hf_model: Models, tmp_path: Path
) -> None:
    frequencies, _, _ = _rotary(hf_model("mixtral"), 1)
    name = ATTENTION + "rotary_emb.inv_freq"
    source = _with(hf_model("mixtral"), tmp_path / "source", {name: change(frequencies)})
    done, plain = from_hf(source, tmp_path / "ours"), from_hf(hf_model("mixtral"), tmp_path / "plain")
    assert done.digest == plain.digest
    assert done.notes[1].startswith(
        f"{name}: other values than config.json implies; transformers takes those"
    )


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rotary_emb.inv_freq", lambda frequencies: frequencies[:3]),
        ("rotary_emb.inv_freq", lambda frequencies: frequencies * float("nan")),
        ("rotary_emb.cos_cached", lambda frequencies: torch.ones(64, 8)),
        ("rotary_emb.sin_cached", lambda frequencies: torch.zeros(64)),
        ("masked_bias", lambda frequencies: torch.tensor(0.5)),
        ("bias", lambda frequencies: torch.ones(1, 1, 8, 8)),
        ("bias", lambda frequencies: torch.ones(32)),
    ],
)
def test_what_the_config_does_not_imply_is_refused_by_name(
    name: str, change: Callable[[Tensor], Tensor], hf_model: Models, tmp_path: Path
) -> None:
    frequencies, _, _ = _rotary(hf_model("mixtral"), 1)
    source = _with(hf_model("mixtral"), tmp_path / "source", {ATTENTION + name: change(frequencies)})
    with pytest.raises(CheckpointError, match=f"has {ATTENTION}{name} of .* which is not what config.json"):
        from_hf(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "prefix", ["model.layers.3.self_attn.", "model.layers.-1.self_attn.", "model.other."]
)
def test_leftovers_of_what_the_model_does_not_have_are_refused(
    prefix: str, hf_model: Models, tmp_path: Path
) -> None:
    frequencies, _, _ = _rotary(hf_model("mixtral"), 1)
    extra = {f"{prefix}rotary_emb.inv_freq": frequencies}
    with pytest.raises(CheckpointError, match=f"has {prefix}rotary_emb.inv_freq, which the model of"):
        from_hf(_with(hf_model("mixtral"), tmp_path / "source", extra), tmp_path / "ours")


def test_frequencies_before_yarn_stretches_them_follow_too(hf_model: Models, tmp_path: Path) -> None:
    plain = 1.0 / 1e4 ** (torch.arange(0, 8, 2) / 8)
    assert not torch.allclose(plain, _rotary(hf_model("deepseek_v2"), 1)[0])
    extra = {f"{ATTENTION}rotary_emb.inv_freq": plain}
    [note] = from_hf(_with(hf_model("deepseek_v2"), tmp_path / "source", extra), tmp_path / "ours").notes
    assert note.startswith("1 tensor of an older release, which follows from config.json, left out: ")


def test_biases_that_are_weights_stay(hf_model: Models, tmp_path: Path) -> None:
    """No name of a leftover is one of a family's own tensors."""
    done = from_hf(hf_model("qwen2_moe"), tmp_path / "ours")
    assert done.notes == []
    assert any(
        name.endswith("q_proj.bias") for name in load_file(hf_model("qwen2_moe") / "model.safetensors")
    )
