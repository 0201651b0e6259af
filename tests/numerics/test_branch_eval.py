"""fairseq-eval-lm reads the branch's files in one process and scores every word as the moe branch did."""

import re

import torch

from tests.helpers.ranks import run_cli
from tests.numerics.branch import CHECKPOINT, DATA, EVAL_FLAGS, expected


def word_scores(output: str) -> dict[str, list[tuple[str, float]]]:
    """Sample id -> its words and their scores, from the lines of --output-word-probs."""
    scores = {}
    for line in output.splitlines():
        found = re.search(r"\| INFO \| fairseq_cli\.eval_lm \| (\d+) (.* \[-?[\d.]+\].*)$", line)
        if found is not None:
            words = [word.rsplit(" ", 1) for word in found[2].split("\t")]
            scores[found[1]] = [(word, float(score.strip("[]"))) for word, score in words]
    return scores


def test_every_word_score_and_the_perplexity_equal_the_branch() -> None:
    theirs = expected()["eval"]
    result = run_cli("fairseq_cli.eval_lm", [DATA, "--path", CHECKPOINT, *EVAL_FLAGS, "--output-word-probs"])
    assert result.exit_code == 0, result.output
    summary = re.search(r"Loss \(base 2\): ([\d.]+), Perplexity: ([\d.]+)", result.output)
    assert summary is not None
    assert round(float(summary[1]), 2) == theirs["loss_base2"]
    assert float(summary[2]) == theirs["ppl"]

    ours = word_scores(result.output)
    assert ours.keys() == theirs["word_scores"].keys()
    assert sum(len(words) for words in ours.values()) == 2762
    for sample, expected_words in theirs["word_scores"].items():
        assert [word for word, _ in ours[sample]] == [word for word, _ in expected_words]
        for (word, our), (_, their) in zip(ours[sample], expected_words, strict=True):
            assert abs(our - their) <= 2e-3, f"{word!r} in sample {sample}"


def test_golden_files_are_small_safe_to_load_and_in_the_branch_layout() -> None:
    size = sum(path.stat().st_size for path in CHECKPOINT.parent.rglob("*") if path.is_file())
    assert size < 2.5e6
    for name in ("shared", "rank-0", "rank-1"):
        state = torch.load(CHECKPOINT.with_name(f"checkpoint_last-{name}.pt"), weights_only=True)
        assert "last_optimizer_state" not in state
        assert state["cfg"]["model"]["_name"] == "transformer_lm_gpt"
        assert all(("expert" in key) is (name != "shared") for key in state["model"])
