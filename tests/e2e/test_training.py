"""fairseq-train with experts: what it prints and writes, and that a resumed run goes on as if never ended."""

from pathlib import Path

import pytest

from fairseq_moe.expert_load.record import read_records
from fairseq_moe.modules.routing.stats import LAYER_STATS
from tests.e2e.commands import BASE, DENSE, EXPERTS, MOE, PLUGIN, json_lines, train
from tests.helpers.ranks import CommandResult, run_cli


@pytest.fixture(scope="module")
def save_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of ``whole``."""
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def whole(text_data: Path, save_dir: Path) -> CommandResult:
    """Four updates on two ranks, validated."""
    flags = ("--moe-eval-capacity-token-fraction", "1.0", "--record-a2a-perf-stats")
    return train(text_data, save_dir, *flags, world_size=2)


def test_statistics_of_the_branch_are_printed(whole: CommandResult) -> None:
    names = {"loss", "moe_gate_loss", "inner_loss", "ppl", "gnorm", *LAYER_STATS}
    for record in json_lines(whole, "train_inner"):
        assert names <= record.keys()
        assert float(record["all_to_all_cpu_time_ms"]) > 0
    (record,) = json_lines(whole, "valid")
    assert {f"valid_{name}" for name in names - {"gnorm"}} <= record.keys()
    assert float(record["valid_drop_rate"]) == 0


def test_training_lowers_the_loss(whole: CommandResult) -> None:
    losses = [float(record["loss"]) for record in json_lines(whole, "train_inner")]
    assert losses[-1] < losses[0] - 0.1


def test_sizes_are_printed_in_the_words_of_the_branch(whole: CommandResult) -> None:
    expert, router, attention = 16 * 32 + 32 + 32 * 16 + 16, 16 * 4, 4 * (16 * 16 + 16)
    norms, embedding = 5 * 2 * 16, 200 * 16
    dense = 2 * attention + expert + router + norms + embedding
    assert f"num. non-expert model params: {dense:,} (num. trained: {dense:,})" in whole.outputs[0]
    assert f"num. expert model params: {2 * expert:,} (num. trained: {2 * expert:,})" in whole.outputs[0]
    assert f"model params: {dense + 4 * expert:,} (per token: {dense + 2 * expert:,};" in whole.outputs[0]


def test_load_of_every_expert_is_recorded(whole: CommandResult, save_dir: Path) -> None:
    records = list(read_records(save_dir))
    assert [record.update for record in records if record.split == "train"] == [1, 2, 3, 4]
    (validation,) = [record for record in records if record.split == "valid"]
    num_tokens = 2 * 2 * 4 * 32  # experts per token, ranks, blocks, tokens of a block
    for record in records:
        assert record.layers == [1]
        assert len(record.wanted[0]) == 4
        assert all(kept <= wanted for kept, wanted in zip(record.kept[0], record.wanted[0], strict=True))
    assert sum(records[0].wanted[0]) == num_tokens
    assert (
        sum(validation.wanted[0]) == 2 * 17 * 32
    )  # 525 tokens; the last block is padded like its neighbours
    assert validation.kept == validation.wanted


def test_resumed_run_goes_on_as_if_never_ended(whole: CommandResult, text_data: Path, tmp_path: Path) -> None:
    train(text_data, tmp_path, "--max-update", "2", "--disable-validation", world_size=2)
    rest = train(text_data, tmp_path, "--disable-validation", world_size=2)
    expected = json_lines(whole, "train_inner")[2:]
    assert [(r["loss"], r["gnorm"]) for r in json_lines(rest, "train_inner")] == [
        (r["loss"], r["gnorm"]) for r in expected
    ]


def test_flags_that_lose_something_warn_once(text_data: Path, tmp_path: Path) -> None:
    flags = ("--criterion", "cross_entropy", "--moe-normalize-expert-grad", "sqrt_world_size")
    flags += ("--sequence-parallel", "--tp-comm-overlap")
    result = train(text_data, tmp_path, *flags, "--no-save", "--disable-validation", model=[*DENSE, *EXPERTS])
    assert result.output.count("does not add the gate loss") == 1
    assert result.output.count("sqrt_world_size takes effect under --ddp-backend fully_sharded and") == 1
    assert result.output.count("--sequence-parallel does nothing without") == 1
    assert result.output.count("--tp-comm-overlap does nothing without") == 1


@pytest.mark.parametrize("arch", ["transformer_lm_gpt", "transformer_lm_gpt2_small", "transformer_lm_big"])
def test_any_architecture_of_the_family_takes_experts_with_the_dummy_task(arch: str, tmp_path: Path) -> None:
    argv = [*PLUGIN, *BASE, "--task", "dummy_lm", "--dict-size", "90", "--tokens-per-sample", "8", *MOE]
    argv += ["--dataset-size", "40", "--batch-size", "2", "--arch", arch, "--no-save", "--disable-validation"]
    argv += ["--decoder-layers", "2", "--decoder-embed-dim", "16", "--decoder-ffn-embed-dim", "32"]
    argv += ["--decoder-input-dim", "16", "--decoder-output-dim", "16", "--decoder-attention-heads", "2"]
    argv += ["--optimizer", "sgd", "--lr", "0.1", "--bf16", "--max-update", "2", "--checkpoint-activations"]
    result = run_cli("fairseq_cli.train", argv, cwd=tmp_path)
    assert result.exit_code == 0, result.output[-3000:]
    assert len(json_lines(result, "train_inner")) == 2
    assert "num. expert model params: 4,288" in result.output
