"""gpt-oss as published, in MXFP4: trained with and without its experts, and given back with and without its blocks."""

from pathlib import Path
from shlex import split

import pytest
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import equal

from fairseq_moe.convert.cli import main
from tests.e2e.commands import BASE, PLUGIN
from tests.helpers.converted import flags_of
from tests.helpers.mxfp4 import build_gpt_oss
from tests.helpers.ranks import run_cli

_TRAINING = (
    "--task language_modeling --tokens-per-sample 30 --sample-break-mode eos --criterion moe_cross_entropy "
    "--optimizer adam --lr 0.005 --max-update 2 --batch-size 1 --no-epoch-checkpoints"
)


def _data(folder: Path) -> Path:
    words = [f"word{index}" for index in range(97)]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    text, data = folder / "text", folder / "data"
    text.write_text(" ".join(words[3:20]) + "\n" + " ".join(words[30:50]) + "\n")
    names = ["--trainpref", text, "--validpref", text, "--tokenizer", folder / "tokenizer.json"]
    assert main(list(map(str, ["preprocess", folder / "model", *names, "--destdir", data]))) == 0
    return data


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [True, False])
def test_only_experts_that_were_not_trained_come_back_as_blocks(
    frozen: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, model, trained = build_gpt_oss(tmp_path / "source"), tmp_path / "model", tmp_path / "trained"
    assert main(["from-hf", str(source), "--to", str(model), "--expert-parallel-size", "2"]) == 0
    flags = [*PLUGIN, *BASE, *split(_TRAINING), *flags_of(model), "--restore-file", model / "checkpoint.pt"]
    flags += [f"--reset-{what}" for what in ("optimizer", "dataloader", "meters", "lr-scheduler")]
    flags += ["--moe-freeze-modules", "experts"] if frozen else []
    result = run_cli("fairseq_cli.train", [_data(tmp_path), *flags, "--save-dir", trained], world_size=1)
    assert result.exit_code == 0, result.output[-3000:]
    # The blocks lie beside the checkpoint that training began with.
    back = tmp_path / "back"
    assert main(["to-hf", str(trained / "checkpoint_last.pt"), "--to", str(back), "--verify"]) == 0
    said = capsys.readouterr()
    assert "verified" in said.out
    assert ("The experts of 3 of 3 layers have been trained since" in said.err) != frozen
    before, after = (load_file(path / "model.safetensors") for path in (source, back))
    blocks = {name for name in before if name.endswith(("_blocks", "_scales"))}
    assert {name for name in after if name.endswith(("_blocks", "_scales"))} == (blocks if frozen else set())
    assert not frozen or all(equal(before[name], after[name]) for name in blocks)
    router = "model.layers.1.mlp.router.weight"
    assert not equal(before[router].float(), after[router].float())
