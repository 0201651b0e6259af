"""fairseq-eval-lm, -validate, -generate, -interactive and hub loading with an MoE model, on 1 and 2 ranks."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import DENSE, PLUGIN, eval_lm, json_lines, perplexity, train
from tests.helpers.ranks import REPOSITORY, run_cli, run_ranks


def test_eval_lm_on_two_ranks_reports_the_perplexity_of_the_whole_text(
    text_data: Path, moe_checkpoint: Path
) -> None:
    alone = eval_lm(text_data, moe_checkpoint)
    together = eval_lm(text_data, moe_checkpoint, world_size=2)
    assert perplexity(together) == perplexity(alone)
    assert _num_evaluated(together.outputs[0]) == _num_evaluated(alone.outputs[0])


def _num_evaluated(output: str) -> int:
    (count,) = re.findall(r"Evaluated ([\d,]+) tokens", output)
    return int(count.replace(",", ""))


@pytest.mark.parametrize(
    "flags",
    [("--is-moe", "--add-bos-token", "--softmax-batch", "7"), ("--max-tokens", "64", "--batch-size", "2")],
    ids=["bos", "max-tokens"],
)
def test_eval_lm_flags_give_the_same_on_two_ranks(
    text_data: Path, moe_checkpoint: Path, flags: tuple[str, ...]
) -> None:
    alone = eval_lm(text_data, moe_checkpoint, *flags)
    together = eval_lm(text_data, moe_checkpoint, *flags, world_size=2)
    assert perplexity(together) == perplexity(alone)


def test_eval_lm_spreads_experts_over_its_own_ranks_whatever_training_did(
    text_data: Path, tmp_path: Path
) -> None:
    experts = ("--num-experts", "4", "--moe-aux-loss-coeff", "0.01", "--criterion", "moe_cross_entropy")
    flags = ("--expert-model-parallel-size", "1", "--max-update", "1", "--disable-validation")
    train(text_data, tmp_path, *flags, world_size=2, model=[*DENSE, *experts])
    alone, together = (
        perplexity(eval_lm(text_data, tmp_path / "checkpoint_last.pt", world_size=size)) for size in (1, 2)
    )
    assert together == alone


def test_eval_lm_of_a_dense_model_reports_the_whole_text(text_data: Path, tmp_path: Path) -> None:
    train(text_data, tmp_path, "--disable-validation", model=DENSE)
    checkpoint = tmp_path / "checkpoint_last.pt"
    alone = eval_lm(text_data, checkpoint)
    together = eval_lm(text_data, checkpoint, world_size=2)
    assert perplexity(together) == perplexity(alone)
    assert _num_evaluated(together.outputs[0]) == _num_evaluated(alone.outputs[0])


def test_validate_gives_the_same_on_two_ranks_with_an_odd_number_of_batches(
    text_data: Path, moe_checkpoint: Path
) -> None:
    alone, together = (_validate(text_data, moe_checkpoint, world_size=size) for size in (1, 2))
    assert {"valid_loss", "valid_inner_loss", "valid_moe_gate_loss", "valid_entropy_gating"} <= set(alone)
    assert together == pytest.approx(alone, abs=2e-3)


def test_validate_gives_the_loss_that_training_gave_with_sharded_states(
    text_data: Path, tmp_path: Path
) -> None:
    trained = train(text_data, tmp_path, "--use-torch-fsdp2", world_size=2)
    (during,) = json_lines(trained, "valid")
    alone, together = (
        _validate(text_data, tmp_path / "checkpoint_last.pt", world_size=size) for size in (1, 2)
    )
    for after in (alone, together):
        assert after["valid_inner_loss"] == pytest.approx(float(during["valid_inner_loss"]), abs=2e-3)


def _validate(data: Path, checkpoint: Path, *, world_size: int) -> dict[str, float]:
    argv = [data, *PLUGIN, "--cpu", "--num-workers", "0", "--path", checkpoint, "--log-format", "json"]
    argv += ["--task", "language_modeling", "--tokens-per-sample", "32", "--batch-size", "1"]
    argv += ["--valid-subset", "valid", "--required-batch-size-multiple", "1"]
    result = run_cli("fairseq_cli.validate", argv, world_size=world_size)
    assert result.exit_code == 0, result.output[-3000:]
    (record,) = json_lines(result, "valid")
    return {key: float(value) for key, value in record.items() if key.startswith("valid_")}


def test_model_overrides_set_the_capacity_in_evaluation(text_data: Path, moe_checkpoint: Path) -> None:
    def with_fraction(value: float) -> float:
        overrides = f"{{'moe_eval_capacity_token_fraction': {value}}}"
        return perplexity(eval_lm(text_data, moe_checkpoint, "--model-overrides", overrides))

    assert with_fraction(0.05) != with_fraction(1.0)


def test_generate_writes_the_same_text_whatever_the_batch(text_data: Path, moe_checkpoint: Path) -> None:
    argv = [text_data, *PLUGIN, "--cpu", "--num-workers", "0", "--path", moe_checkpoint, "--seed", "1"]
    argv += ["--task", "language_modeling", "--tokens-per-sample", "32", "--gen-subset", "valid"]
    argv += ["--sample-break-mode", "eos", "--prefix-size", "3", "--max-len-b", "12", "--beam", "2"]
    argv += ["--required-batch-size-multiple", "1"]  # stock leaves out batches that are no multiple

    def hypotheses(batch_size: int) -> dict[str, tuple[float, str]]:
        result = run_cli("fairseq_cli.generate", [*argv, "--batch-size", batch_size])
        assert result.exit_code == 0, result.output[-3000:]
        found = re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", result.output, flags=re.MULTILINE)
        return {sample: (float(score), text) for sample, score, text in found}

    one_by_one, together = hypotheses(1), hypotheses(7)
    assert len(one_by_one) == 21
    assert {key: text for key, (_, text) in together.items()} == {
        key: text for key, (_, text) in one_by_one.items()
    }
    for key, (score, _) in one_by_one.items():
        assert together[key][0] == pytest.approx(score, abs=1e-4)


def test_interactive_continues_a_line(text_data: Path, moe_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("the value of\n")
    argv = [text_data, *PLUGIN, "--cpu", "--path", moe_checkpoint, "--task", "language_modeling"]
    argv += ["--input", tmp_path / "input.txt", "--max-len-b", "10", "--beam", "1"]
    result = run_cli("fairseq_cli.interactive", argv)
    assert result.exit_code == 0, result.output[-3000:]
    assert re.search(r"^H-0\t\S+\tthe value of ", result.output, flags=re.MULTILINE)


def test_fine_tuning_starts_from_the_given_model(
    text_data: Path, moe_checkpoint: Path, tmp_path: Path
) -> None:
    result = train(
        text_data,
        tmp_path,
        *("--finetune-from-model", moe_checkpoint, "--lr", "0.0"),
        *("--max-update", "1", "--batch-size-valid", "1"),
    )
    before = _validate(text_data, moe_checkpoint, world_size=1)
    (after,) = json_lines(result, "valid")
    assert float(after["valid_inner_loss"]) == pytest.approx(before["valid_inner_loss"], abs=2e-3)


def test_hub_model_scores_and_samples(text_data: Path, moe_checkpoint: Path) -> None:
    (found,) = run_ranks(_use_hub_model, 1, str(moe_checkpoint), str(text_data))
    assert found["score"] < 0
    assert found["num_tokens"] == 4
    assert found["sample"].startswith("the value ")
    assert len(found["sample"].split()) > 2


def test_hub_model_in_a_process_group_holds_all_experts(text_data: Path, moe_checkpoint: Path) -> None:
    alone, nobody_calls = run_ranks(_use_hub_model_on_rank_0, 2, str(moe_checkpoint), str(text_data))
    assert nobody_calls is None
    assert alone["score"] < 0


def _use_hub_model_on_rank_0(rank: int, checkpoint: str, data: str) -> dict[str, Any] | None:
    return _use_hub_model(rank, checkpoint, data) if rank == 0 else None


def _use_hub_model(rank: int, checkpoint: str, data: str) -> dict[str, Any]:
    from fairseq.models.transformer_lm import TransformerLanguageModel

    import fairseq_moe  # noqa: F401

    path = Path(checkpoint)
    model = TransformerLanguageModel.from_pretrained(str(path.parent), path.name, data)
    model.eval()
    scored = model.score("the value of the")
    return {
        "score": float(scored["score"]),
        "num_tokens": len(scored["tokens"]),
        "sample": model.sample("the value", beam=1, max_len_b=6),
    }


def test_generation_token_by_token_equals_the_full_forward_pass(
    text_data: Path, moe_checkpoint: Path
) -> None:
    run_ranks(_compare_incremental_with_full, 1, str(moe_checkpoint), str(text_data))


def _compare_incremental_with_full(rank: int, checkpoint: str, data: str) -> None:
    import torch
    from fairseq import checkpoint_utils

    import fairseq_moe  # noqa: F401

    overrides = {"data": data, "moe_eval_capacity_token_fraction": 1.0}  # nothing is dropped
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([checkpoint], overrides)
    model.eval()
    tokens = torch.randint(4, 100, (3, 9))
    with torch.no_grad():
        full, _ = model(tokens)
        state: dict[str, Any] = {}
        steps = [model(tokens[:, : t + 1], incremental_state=state)[0] for t in range(tokens.shape[1])]
        alone, _ = model(tokens[:1])
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone, full[:1], rtol=1e-5, atol=1e-5)


def test_overrides_reach_flags_that_the_branch_does_not_have() -> None:
    (config,) = run_ranks(_config_of_the_branch_with_overrides, 1)
    assert "moe_generation_capacity_token_fraction=0.5" in config
    assert "moe_eval_capacity_token_fraction=0.7" in config


def _config_of_the_branch_with_overrides(rank: int) -> str:
    from fairseq import checkpoint_utils

    import fairseq_moe  # noqa: F401

    folder = REPOSITORY / "tests" / "golden" / "moe_branch"
    overrides = {"data": str(folder / "bin"), "moe_generation_capacity_token_fraction": 0.5}
    overrides["moe_eval_capacity_token_fraction"] = 0.7
    path = str(folder / "checkpoint_last.pt")
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([path], overrides)
    return str(model.decoder.moe)


def test_generation_capacity_can_be_limited(text_data: Path, moe_checkpoint: Path) -> None:
    run_ranks(_compare_limited_generation, 1, str(moe_checkpoint), str(text_data))


def _compare_limited_generation(rank: int, checkpoint: str, data: str) -> None:
    import torch
    from fairseq import checkpoint_utils

    import fairseq_moe  # noqa: F401

    logits = []
    for fraction in (None, 0.01):
        overrides = {"data": data, "moe_generation_capacity_token_fraction": fraction}
        (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([checkpoint], overrides)
        model.eval()
        with torch.no_grad():
            logits.append(model(torch.full((8, 1), 7), incremental_state={})[0])
    assert (logits[0][1:] == logits[0][0]).all()  # the same token in every row, nothing dropped
    assert not torch.equal(logits[1][1:], logits[0][1:])  # now only the first row has a place
