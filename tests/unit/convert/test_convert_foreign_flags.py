"""A main file may say anything: to-hf answers damaged and foreign settings with one sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq_moe.convert import from_hf
from fairseq_moe.convert.cli import main

Models = Callable[..., Path]
_CFG: list[tuple[Callable[[Any], object], str]] = [
    (lambda cfg: cfg["model"].pop("decoder_attention_heads"), "--decoder-attention-heads is None, expected"),
    (lambda cfg: cfg["model"].update(decoder_attention_heads=0), "--decoder-attention-heads is 0, expected"),
    (lambda cfg: cfg["model"].update(decoder_attention_heads="x"), "--decoder-attention-heads is 'x'"),
    (lambda cfg: cfg.update(model="x"), "cannot read checkpoint file"),
    (lambda cfg: cfg.update(checkpoint=[1]), "cannot read checkpoint file"),
    (lambda cfg: cfg["checkpoint"].update(restore_file=["x"]), "cannot read checkpoint file"),
    (lambda cfg: cfg["model"].update(max_target_positions="x"), "cannot read checkpoint file"),
    (lambda cfg: cfg["model"].update(max_target_positions=float("inf")), "cannot read checkpoint file"),
    (lambda cfg: cfg["model"].update(moe_layer_freq="zzz"), "--moe-layer-freq is 'zzz'"),
    (lambda cfg: cfg["model"].update(moe_layer_freq=[1]), "--moe-layer-freq is [1], which is of no type"),
    (lambda cfg: cfg["model"].update(moe_aux_loss_coeff="x"), "--moe-aux-loss-coeff is 'x'"),
    (
        lambda cfg: cfg["model"].update(moe_router_load_balancing_type="x"),
        "--moe-router-load-balancing-type is x",
    ),
    (lambda cfg: cfg["model"].update(num_experts=4.5), "--num-experts is 4.5, which is of no type"),
    (lambda cfg: cfg["model"].update(norm_eps="x"), "--norm-eps is 'x', which is of no type"),
    (lambda cfg: cfg["model"].update(decoder_layers=None), "--decoder-layers is None, expected"),
    (lambda cfg: cfg["model"].update(kv_lora_rank=4), "--kv-lora-rank needs --qk-nope-head-dim"),
    (lambda cfg: cfg["model"].update(rope_scaling="yarn"), "--rope-scaling yarn needs --rope-scaling-factor"),
    (lambda cfg: cfg["model"].update(qk_norm="x"), "--qk-norm is 'x', expected one of"),
    (lambda cfg: cfg.pop("model"), "does not say how long sequences may be"),
]


@pytest.fixture(scope="module")
def converted(hf_model: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The main file of a converted model."""
    folder = tmp_path_factory.mktemp("converted") / "ours"
    from_hf(hf_model("mixtral"), folder)
    return folder / "checkpoint.pt"


def _refused(path: Path, state: Any, capsys: pytest.CaptureFixture[str]) -> str:
    changed = path.with_name("changed.pt")
    torch.save(state, changed)
    target = path.with_name("back")
    assert main(["to-hf", str(changed), "--to", str(target)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fairseq_moe.convert: ")
    assert said.count("\n") == 1
    assert not target.exists()
    return said


@pytest.mark.parametrize(("change", "expected"), _CFG)
def test_settings_of_any_form_end_with_a_sentence(
    change: Callable[[Any], object], expected: str, converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(converted, weights_only=True)
    change(state["cfg"])
    assert expected in _refused(converted, state, capsys)


@pytest.mark.parametrize("cfg", [[1], "x", 1])
def test_settings_that_are_none_end_with_a_sentence(
    cfg: Any, converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(converted, weights_only=True) | {"cfg": cfg}
    assert "cannot read checkpoint file" in _refused(converted, state, capsys)
