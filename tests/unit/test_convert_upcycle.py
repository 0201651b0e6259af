"""Experts from a dense checkpoint: the model computes what the dense one computes, and trains from there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

from fairseq_moe.convert.cli import main
from fairseq_moe.convert.dictionary import IdentityDictionary
from fairseq_moe.convert.dictionary_file import IdentityLine
from fairseq_moe.convert.settings import complete_settings
from fairseq_moe.convert.store import fresh_state
from fairseq_moe.convert.upcycle import upcycle
from fairseq_moe.errors import CheckpointError

SIZES = {
    "decoder_layers": 2, "decoder_embed_dim": 16, "decoder_input_dim": 16, "decoder_output_dim": 16,
    "decoder_ffn_embed_dim": 24, "decoder_attention_heads": 2, "share_decoder_input_output_embed": True,
}  # fmt: skip
BLOCKS = {"position_embedding": "rope", "decoder_normalization": "rmsnorm"}


def _task() -> LanguageModelingTask:
    dictionary = IdentityDictionary(IdentityLine(vocab_size=31, bos=None, eos=None))
    return LanguageModelingTask(LanguageModelingConfig(), dictionary)


def _dense(path: Path, **flags: Any) -> Any:
    """A dense model with random biases too, saved as stock saves it."""
    from omegaconf import OmegaConf

    cfg = complete_settings({**SIZES, **BLOCKS, **flags}, max_positions=32)
    torch.manual_seed(0)
    model = _task().build_model(OmegaConf.create(cfg["model"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    torch.save({**fresh_state(cfg), "model": model.state_dict()}, path)
    return model.eval()


def _logits(path: Path) -> torch.Tensor:
    models, _ = checkpoint_utils.load_model_ensemble([str(path)], task=_task())
    return _of(models[0].eval())


def _of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(1)))[0]


@pytest.mark.parametrize(
    ("flags", "experts", "top_k", "granularity", "layers"),
    [
        ({"activation_fn": "gelu"}, 4, 2, 1, "1"),
        ({"gated_ffn": True}, 4, 3, 1, "([0]+[1])"),
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
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    _dense(tmp_path / "dense.pt")
    with pytest.raises(CheckpointError) as caught:
        upcycle(tmp_path / "dense.pt", tmp_path / "moe", **sizes)
    assert expected in str(caught.value)
    assert not (tmp_path / "moe").exists()


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
