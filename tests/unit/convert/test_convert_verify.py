"""--verify: the commands of docs/convert.md as they stand there, and what happens when nothing can be compared."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fairseq_moe.convert import from_hf
from fairseq_moe.convert.cli import main
from fairseq_moe.errors import CheckpointError
from tests.helpers.docs import documented_command

Models = Callable[..., Path]
verify_module = importlib.import_module("fairseq_moe.convert.verify")


def test_the_commands_of_the_page_verify(
    hf_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("DIR").symlink_to(hf_model("deepseek_v3"))
    assert main(documented_command("convert.md", "from-hf")) == 0
    Path("MODEL").rename("TRAINED")
    Path("TRAINED/checkpoint.pt").rename("TRAINED/checkpoint_last.pt")
    back = documented_command("convert.md", "to-hf")
    assert back[-2:] == ["bfloat16", "--verify"]
    assert main(back) == 0
    assert capsys.readouterr().out.count("verified: logits of both models") == 2
    with pytest.raises(CheckpointError, match=r"the logits of .* differ"):  # the model is not in bfloat16
        verify_module.verify(Path("EXPORT"), Path("TRAINED/checkpoint_last.pt"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_biases_of_routers_are_not_rounded(dtype: str, hf_model: Models, tmp_path: Path) -> None:
    from_hf(hf_model("deepseek_v3"), tmp_path / "ours")
    exact = verify_module.our_model(tmp_path / "ours" / "checkpoint.pt", 97)
    rounded = verify_module.our_model(tmp_path / "ours" / "checkpoint.pt", 97, getattr(torch, dtype))
    for name, tensor in exact.state_dict().items():
        expected = tensor if name.endswith(("bias", "version")) else tensor.to(getattr(torch, dtype)).float()
        assert torch.equal(rounded.state_dict()[name], expected), name


def test_quantised_weights_are_refused_before_the_work(
    hf_model: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(hf_model("deepseek_v3"), source)
    values = json.loads((source / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
    (source / "config.json").write_text(json.dumps(values))
    assert main(["from-hf", str(source), "--to", str(tmp_path / "ours"), "--verify"]) == 2
    assert "leave out --verify" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def _fails(*args: Any, **kwargs: Any) -> Any:
    raise TypeError("\nunsupported operand\nand much more")


class _Model:
    config = SimpleNamespace(vocab_size=97)
    __call__ = _fails

    def eval(self) -> "_Model":
        return self


@pytest.mark.parametrize("load", [_fails, lambda *args, **kwargs: _Model()])
def test_what_transformers_raises_is_a_sentence(
    load: Callable[..., Any],
    hf_model: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, ours = hf_model("mixtral"), tmp_path / "ours"
    theirs = SimpleNamespace(AutoModelForCausalLM=SimpleNamespace(from_pretrained=load))
    monkeypatch.setattr(verify_module, "_transformers", lambda: theirs)
    assert main(["from-hf", str(source), "--to", str(ours), "--verify"]) == 2
    captured = capsys.readouterr()
    assert f"written: {ours}" in captured.out
    assert captured.err == (
        f"fairseq_moe.convert: the output is written but could not be compared: transformers does not run {source} "
        "(TypeError: unsupported operand).\n"
    )
