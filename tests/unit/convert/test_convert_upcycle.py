"""Experts from a dense checkpoint: the model computes what the dense one computes, and trains from there."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

from fairseq_moe.convert.cli import main
from fairseq_moe.convert.store import fresh_state
from fairseq_moe.convert.upcycle import upcycle
from fairseq_moe.data.identity_dictionary import IdentityDictionary, IdentityLine
from fairseq_moe.errors import CheckpointError

SIZES = {
    "decoder_layers": 2, "decoder_embed_dim": 16, "decoder_input_dim": 16, "decoder_output_dim": 16,
    "decoder_ffn_embed_dim": 24, "decoder_attention_heads": 2, "share_decoder_input_output_embed": True,
}  # fmt: skip
BLOCKS = {"position_embedding": "rope", "decoder_normalization": "rmsnorm"}
STOCK_BLOCKS: dict[str, Any] = dict.fromkeys(BLOCKS)


def _task(*, is_stock: bool = False) -> LanguageModelingTask:
    dictionary: Dictionary = IdentityDictionary(IdentityLine(vocab_size=31, bos=None, eos=None))
    if is_stock:  # stock's blocks need a place for padding
        dictionary = Dictionary()
        for word in range(31 - len(dictionary)):
            dictionary.add_symbol(str(word))
    return LanguageModelingTask(LanguageModelingConfig(), dictionary)


def _dense(path: Path, **flags: Any) -> Any:
    """A dense model with random biases too, saved as stock saves it."""
    from omegaconf import OmegaConf

    from fairseq_moe.convert.store import complete_settings

    cfg = complete_settings({**SIZES, **BLOCKS, **flags}, max_positions=32)
    torch.manual_seed(0)
    is_stock = not flags.get("position_embedding", True)
    if is_stock:  # as fairseq-train --arch transformer_lm_gpt has it; elsewhere stock overlooks --scale-fc
        cfg["model"] = Namespace(**cfg["model"])
    model = _task(is_stock=is_stock).build_model(cfg["model"] if is_stock else OmegaConf.create(cfg["model"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    torch.save({**fresh_state(cfg), "model": model.state_dict()}, path)
    return model.eval()


def _logits(path: Path, *, is_stock: bool = False) -> torch.Tensor:
    models, _ = checkpoint_utils.load_model_ensemble([str(path)], task=_task(is_stock=is_stock))
    return _of(models[0].eval())


def _of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(1)))[0]


@pytest.mark.parametrize(
    ("flags", "experts", "top_k", "granularity", "layers"),
    [
        ({"activation_fn": "gelu"}, 4, 2, 1, "1"),
        ({"gated_ffn": True}, 4, 3, 1, "([0]+[1])"),
        ({"gated_ffn": True, "gated_ffn_bias": True, "swiglu_limit": 0.5}, 4, 3, 1, "1"),
        ({"activation_fn": "relu"}, 8, 4, 2, "1"),
        ({"activation_fn": "relu"}, 12, 3, 3, "2"),
    ],
)
def test_the_output_is_the_dense_models(
    flags: dict[str, Any], experts: int, top_k: int, granularity: int, layers: str, tmp_path: Path
) -> None:
    dense = _dense(tmp_path / "dense.pt", **flags)
    sizes = {"num_experts": experts, "top_k": top_k, "granularity": granularity, "layers": layers}
    done = upcycle(tmp_path / "dense.pt", tmp_path / "moe", num_shards=2, **sizes)  # type: ignore[arg-type]
    assert done.is_equal
    torch.testing.assert_close(_logits(done.target), _of(dense), atol=2e-5, rtol=1e-5)


def test_slices_of_other_functions_are_said_to_differ(tmp_path: Path) -> None:
    dense = _dense(tmp_path / "dense.pt", gated_ffn=True)
    done = upcycle(tmp_path / "dense.pt", tmp_path / "moe", num_experts=4, top_k=2, granularity=2)
    assert not done.is_equal
    assert not torch.allclose(_logits(done.target), _of(dense), atol=1e-3)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (
            {"num_experts": 5, "top_k": 5, "granularity": 5},
            "a width of 24 does not divide by --granularity 5",
        ),
        ({"num_experts": 3, "top_k": 2, "granularity": 2}, "--num-experts 3 is no multiple"),
        ({"num_experts": 4, "top_k": 3, "granularity": 2}, "--topk 3 is no multiple"),
        ({"num_experts": 4, "top_k": 1}, "--topk 1 is no multiple of --granularity 1 from 2"),
        ({"num_experts": 4, "top_k": 2, "num_shards": 3}, "4 experts do not divide over 3 shards"),
        ({"num_experts": 4, "top_k": 2, "layers": "x"}, "--moe-layer-freq is 'x'"),
        (
            {"num_experts": 4, "top_k": 2, "layers": "([0]*2)"},
            "--moe-layer-freq ([0]*2) gives no layer experts",
        ),
        ({"num_experts": 4, "top_k": 2, "seed": 10**30}, "is not a number of 64 bits"),
        ({"num_experts": 4, "top_k": 2, "seed": -1}, "--seed -1 is not a number of 64 bits"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    _dense(tmp_path / "dense.pt")
    with pytest.raises(CheckpointError) as caught:
        upcycle(tmp_path / "dense.pt", tmp_path / "moe", **sizes)
    assert expected in str(caught.value)
    assert not (tmp_path / "moe").exists()


_FC1 = "decoder.layers.1.fc1"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda state: state.pop("cfg"), "is no dense checkpoint"),
        (lambda state: state.update(cfg=[1]), "is no dense checkpoint"),
        (lambda state: state.update(model=torch.ones(2)), "is no dense checkpoint"),
        (lambda state: state["cfg"].pop("model"), "KeyError: 'model'"),
        (lambda state: state["cfg"].update(model="x"), "cannot read checkpoint file"),
        (lambda state: state["cfg"]["model"].pop("decoder_layers"), "KeyError: 'decoder_layers'"),
        (lambda state: state["cfg"]["model"].update(moe_freq=2), "was trained with --moe-freq"),
        (
            lambda state: state["cfg"]["model"].update(num_experts=4),
            "was trained with --moe-freq or --num-experts",
        ),
        (
            lambda state: state["model"].pop("decoder.layers.0.fc2.weight"),
            "lacks decoder.layers.0.fc2.weight",
        ),
        (
            lambda state: [state["model"].pop(f"{_FC1}.{kind}") for kind in ("weight", "bias")],
            f"lacks {_FC1}.w",
        ),
        (
            lambda state: state["model"].update({f"{_FC1}.weight": torch.ones(8, 16)}),
            f"has {_FC1}.weight of shape (8, 16), expected (24, 16)",
        ),
        (lambda state: state["model"].update({f"{_FC1}.weight": 1}), "cannot read checkpoint file"),
        *(
            (lambda state, name=name: state["model"].update({name: torch.ones(1)}), f"has {name}")
            for name in (
                "decoder.layers.1.moe_layer.gate.wg.weight",
                "decoder.layers.1.ffn_layernorm.weight",
                "decoder.layers.5.fc1.weight",
                "decoder.layers.q",
                "decoder.mtp.0.layer.fc1.weight",
                f"{_FC1}.scale",
            )
        ),
    ],
)
def test_models_that_do_not_fit_are_refused(
    change: Callable[[Any], object], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "dense.pt"
    _dense(path)
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    assert main(["upcycle", str(path), "--num-experts", "4", "--to", str(tmp_path / "moe")]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("scale_fc", "ffn_layernorm.weight"),
        ("scale_attn", "attn_ln.weight"),
        ("scale_heads", "c_attn"),
        ("scale_resids", "w_resid"),
    ],
)
def test_scales_are_refused(flag: str, name: str, tmp_path: Path) -> None:
    _dense(tmp_path / "dense.pt", **STOCK_BLOCKS, **{flag: True})
    with pytest.raises(CheckpointError, match=rf"has decoder\.layers\.0\.{name}"):
        upcycle(tmp_path / "dense.pt", tmp_path / "moe", num_experts=4, top_k=2)


def test_stocks_blocks_become_experts(tmp_path: Path) -> None:
    dense = _dense(tmp_path / "dense.pt", **STOCK_BLOCKS)
    done = upcycle(tmp_path / "dense.pt", tmp_path / "moe", num_experts=4, top_k=2)
    torch.testing.assert_close(_logits(done.target, is_stock=True), _of(dense), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["decoder.layers.0.fc1.weight", "decoder.layer_norm.weight"])
def test_a_weight_that_is_not_finite_is_refused_by_name(name: str, tmp_path: Path) -> None:
    source = tmp_path / "dense.pt"
    _dense(source)
    state = torch.load(source, weights_only=False)
    tensor = state["model"][name]
    tensor.view(-1)[5] = float("inf")
    torch.save(state, source)
    with pytest.raises(CheckpointError) as caught:
        upcycle(source, tmp_path / "ours", num_experts=4, top_k=2)
    assert f"{source} has {name} with the value inf (1 of {tensor.numel()} values)" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.pt"]


def test_the_command_says_which_flags_to_add(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _dense(tmp_path / "dense.pt", activation_fn="gelu")
    command = ["upcycle", str(tmp_path / "dense.pt"), "--num-experts", "4", "--topk", "2", "--to"]
    assert main([*command, str(tmp_path / "moe")]) == 0
    assert "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 24" in capsys.readouterr().out
    assert main([*command, str(tmp_path / "some"), "--moe-layer-freq", "([0]+[1])"]) == 0
    assert (
        "--moe-layer-freq '([0]+[1])'" in capsys.readouterr().out
    )  # bash would take the bare one for syntax
    assert (
        main(["upcycle", str(tmp_path / "moe" / "checkpoint.pt"), *command[2:], str(tmp_path / "again")]) == 2
    )
    assert "is no dense checkpoint" in capsys.readouterr().err
