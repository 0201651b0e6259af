"""Checkpoints of a real run go through the tools, and training and evaluation go on from what comes out."""

import sys
from pathlib import Path

import pytest
import torch

from fairseq_moe.checkpoint import Checkpoint, LazyTensor, has_expert_rows, write_checkpoint
from fairseq_moe.checkpoint_tools.command import main
from tests.e2e.commands import eval_lm, eval_lm_argv, json_lines, perplexity, train
from tests.e2e.processes import run_process
from tests.helpers.checkpoints import assert_same, contents
from tests.helpers.ranks import run_cli, run_ranks

# Without the plugin, even by accident: python refuses to import what is None here.
_STOCK_ALONE = (
    "import sys; sys.modules['fairseq_moe'] = None; from fairseq_cli.eval_lm import cli_main; cli_main()"
)


def tool(*argv: object) -> None:
    assert main([str(part) for part in argv]) == 0


@pytest.fixture(scope="module")
def trained(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which two ranks have made two updates and saved each; evaluation drops no token."""
    save_dir = tmp_path_factory.mktemp("trained")
    flags = ["--max-update", "2", "--save-interval-updates", "1", "--disable-validation"]
    flags += ["--moe-eval-capacity-token-fraction", "1.0"]
    train(text_data, save_dir, *flags, world_size=2)
    return save_dir


def test_training_goes_on_from_a_consolidated_and_resharded_checkpoint(
    trained: Path, text_data: Path, tmp_path: Path
) -> None:
    source, one, eight = (
        trained / "checkpoint_last.pt",
        tmp_path / "one" / "a.pt",
        tmp_path / "eight" / "a.pt",
    )
    tool("verify", source)
    tool("consolidate", source, "--to", one)
    tool("reshard", one, "--to", eight, "--shards", 8)
    assert_same(contents(eight), contents(source))
    losses = []
    for number, start in enumerate((source, eight)):
        flags = ["--restore-file", start, "--disable-validation"]
        result = train(text_data, tmp_path / str(number), *flags)
        losses.append([(line["num_updates"], line["loss"]) for line in json_lines(result, "train_inner")])
    assert [update for update, _ in losses[0]] == ["3", "4"]
    assert losses[0] == losses[1]


def test_an_average_is_evaluated_and_trained_from(trained: Path, text_data: Path, tmp_path: Path) -> None:
    to = tmp_path / "mean.pt"
    tool("average", "--last", 2, trained, "--to", to)
    both = [contents(trained / name) for name in ("checkpoint_1_1.pt", "checkpoint_1_2.pt")]
    for key, tensor in contents(to).items():
        assert torch.equal(tensor, ((both[0][key].double() + both[1][key].double()) / 2).float()), key
    assert perplexity(eval_lm(text_data, to)) > 1
    result = train(text_data, tmp_path / "on", "--finetune-from-model", to, "--disable-validation")
    assert len(json_lines(result, "train_inner")) == 4


def equal_experts(source: Path, to: Path) -> None:
    """A copy whose experts are all the mean of the layer's."""
    checkpoint = Checkpoint.open(source)
    content = checkpoint.content(expert_ids=range(4), with_optimizer=False)
    for name, tensor in content.model.items():
        assert isinstance(tensor, LazyTensor)
        if has_expert_rows(name):
            rows = tensor.load()
            content.model[name] = rows.double().mean(0, keepdim=True).float().expand_as(rows)
    manifest = checkpoint.manifest
    write_checkpoint(
        to,
        state={**checkpoint.state, "last_optimizer_state": None},
        run_id=manifest.run_id,
        update=manifest.update,
        shape=manifest.shape,
        contents=[content],
        num_shards=1,
    )


def logits(rank: int, data: str, paths: list[str]) -> list[tuple[torch.Tensor, int]]:
    """What the models in these checkpoints say about some words, and their numbers of parameters."""
    from fairseq import checkpoint_utils

    import fairseq_moe  # noqa: F401

    words = torch.randint(4, 100, (2, 32), generator=torch.Generator().manual_seed(0))
    found = []
    for path in paths:
        (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([path], arg_overrides={"data": data})
        with torch.no_grad():
            found.append((model.eval()(words)[0], sum(p.numel() for p in model.parameters())))
    return found


@pytest.mark.slow
def test_a_dense_checkpoint_is_stocks_and_computes_what_equal_experts_do(
    trained: Path, text_data: Path, tmp_path: Path
) -> None:
    moe, dense, mean = tmp_path / "moe" / "a.pt", tmp_path / "dense.pt", tmp_path / "mean.pt"
    equal_experts(trained / "checkpoint_last.pt", moe)
    tool("to-dense", moe, "--to", dense, "--expert", 3)
    tool("to-dense", trained / "checkpoint_last.pt", "--to", mean, "--mean")
    paths = [moe, dense, mean, trained / "checkpoint_last.pt"]
    (found,) = run_ranks(logits, 1, str(text_data), [str(path) for path in paths])
    (y_moe, size_moe), (y_dense, size_dense), (y_mean, _), (y_unequal, _) = found
    assert size_dense < size_moe
    torch.testing.assert_close(y_dense, y_moe, rtol=0, atol=2e-6)
    assert torch.equal(y_mean, y_dense)
    assert (y_unequal - y_dense).abs().max() > 1e-4  # experts that differ are no dense model
    expected = perplexity(eval_lm(text_data, moe))
    argv = [str(part) for part in eval_lm_argv(text_data, dense, plugin=False)]
    stock = run_process(sys.executable, "-c", _STOCK_ALONE, *argv, cwd=tmp_path, python_path=tmp_path)
    assert stock.exit_code == 0, stock.output[-3000:]
    assert perplexity(stock) == pytest.approx(expected, abs=0.01)


def test_the_tools_are_a_module_that_is_run(trained: Path) -> None:
    result = run_cli(
        "tests.e2e.starts",
        ["fairseq_moe.checkpoint_tools", "inspect", trained / "checkpoint_last.pt"],
        function="as_main_module",
    )
    assert result.exit_code == 0, result.output
    assert "fairseq_moe, format 2" in result.output
    missing = run_cli(
        "tests.e2e.starts",
        ["fairseq_moe.checkpoint_tools", "inspect", trained / "none.pt"],
        function="as_main_module",
    )
    assert missing.exit_code == 2
    assert "Traceback" not in missing.output
