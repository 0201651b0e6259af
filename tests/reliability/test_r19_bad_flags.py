"""R19: flags that cannot be honoured end a command with exit code 2 and one sentence for each, before data is read.

Whole command lines, in one forked process, each with a second bad flag, whose sentence must be there too. Every single
value: ``tests/unit/flags/test_moe.py`` and ``test_megatron_refusals.py``; under torchrun and with spawned ranks:
``tests/e2e/test_bad_input.py``.
"""

import contextlib
import functools
import io
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import BASE, DENSE, PLUGIN
from tests.helpers.ranks import run_ranks

BRANCH = ("--moe-freq", 2, "--moe-expert-count", 4)
TOPK = ("--num-experts", 4, "--moe-router-topk", 2)
T4 = ("--tensor-model-parallel-size", 4, "--distributed-world-size", 4)
P2 = ("--pipeline-model-parallel-size", 2, "--distributed-world-size", 2)
ALSO_BAD = ("--moe-expert-ffn-dim", -8)
MAX_SEC = 10.0
# Flags, and what the sentence about them says.
CASES: list[tuple[tuple[Any, ...], str]] = [
    ((*BRANCH, "--moe-expert-count", 3, "--distributed-world-size", 2), "3 experts do not fit 2 ranks"),
    ((*TOPK, "--expert-model-parallel-size", 3), "--expert-model-parallel-size is 3"),
    ((*TOPK, "--expert-model-parallel-size", 2), "--expert-model-parallel-size is 2"),  # of one rank
    ((*TOPK, "--expert-model-parallel-size", 2, "--distributed-world-size", 3), "a divisor of both the 4"),
    ((*TOPK, "--expert-model-parallel-size", 0), "--expert-model-parallel-size is 0"),
    (
        (*TOPK, "--context-parallel-size", 2),
        "--context-parallel-size 2 is 2, expected a divisor of the 1 ranks",
    ),
    ((*TOPK, "--tensor-model-parallel-size", 0), "--tensor-model-parallel-size is 0"),
    ((*TOPK, *T4), "--tensor-model-parallel-size 4 needs --sequence-parallel"),
    ((*TOPK, *T4, "--sequence-parallel"), "4 does not divide --decoder-attention-heads 2"),
    ((*TOPK, *T4, "--ddp-backend", "pytorch_ddp"), "--ddp-backend pytorch_ddp sums all gradients"),
    ((*TOPK, *T4, "--moe-extended-tp", "--moe-extended-ep"), "--moe-extended-ep leaves whole"),
    ((*TOPK, "--cp-comm-type", "p2p"), "--cp-comm-type is 'p2p'"),
    ((*TOPK, "--pipeline-model-parallel-size", 2), "2, expected a divisor of the 1 ranks"),
    ((*TOPK, *P2, "--decoder-last-pipeline-num-layers", 2), "0 of 2 layers are for the other 1 of 2"),
    ((*TOPK, *P2, "--num-virtual-stages-per-pipeline-rank", 2), "is 4 stages, expected at most the 2 layers"),
    ((*TOPK, "--num-layers-per-virtual-pipeline-stage", 1), "needs several pipeline ranks"),
    ((*TOPK, "--pipeline-chunks", 2), "are those of --update-freq"),
    ((*TOPK, *P2, "--task", "own_steps"), "--task own_steps has a train_step of its own"),
    ((*BRANCH, "--model-parallel-size", 2), "use --tensor-model-parallel-size with --sequence-parallel"),
    ((*BRANCH, "--moe-expert-count", 1), "top-2 routing needs at least 2"),
    ((*BRANCH, "--moe-expert-count", 0), "--moe-expert-count is 0"),
    ((*BRANCH, "--moe-freq", 3), "--moe-freq is 3"),
    ((*BRANCH, "--moe-freq", -1), "--moe-freq is -1"),
    (("--moe-expert-count", 4), "--moe-freq is 0"),
    ((*TOPK, "--moe-router-topk", 5), "--moe-router-topk is 5"),
    ((*TOPK, "--moe-router-topk", 0), "--moe-router-topk is 0"),
    (("--num-experts", 0), "--num-experts is 0"),
    ((*TOPK, "--moe-expert-capacity-factor", 0), "--moe-expert-capacity-factor is 0"),
    ((*TOPK, "--moe-expert-capacity-factor", "nan"), "--moe-expert-capacity-factor is nan"),
    ((*BRANCH, "--moe-eval-capacity-token-fraction", "nan"), "--moe-eval-capacity-token-fraction is nan"),
    ((*TOPK, "--moe-router-score-function", "tanh"), "--moe-router-score-function is 'tanh'"),
    ((*TOPK, "--moe-router-force-load-balancing", "lru"), "--moe-router-force-load-balancing is 'lru'"),
    ((*TOPK, "--moe-token-dispatcher-type", "pigeon"), "--moe-token-dispatcher-type is 'pigeon'"),
    ((*BRANCH, "--moe-second-expert-policy", "best"), "--moe-second-expert-policy is 'best'"),
    ((*TOPK, "--moe-layer-freq", "[0,0]"), "gives no layer experts"),
    ((*TOPK, "--moe-layer-freq", "[1]"), "--moe-layer-freq"),
    ((*BRANCH, "--zero-sharding", "os"), "--zero-sharding"),
    ((*BRANCH, "--use-bmuf"), "--use-bmuf"),
    ((*BRANCH, "--fp16"), "--fp16-no-flatten-grads"),
    ((*BRANCH, "--criterion", "moe_cross_entropy", "--moe-gate-loss-wt", -1), "--moe-gate-loss-wt is -1"),
    ((*TOPK, "--moe-aux-loss-coeff", "-1"), "--moe-aux-loss-coeff is -1"),
    ((*TOPK, "--moe-z-loss-coeff", "inf"), "--moe-z-loss-coeff is inf"),
    ((*TOPK, "--moe-ffn-hidden-size", 0), "--moe-ffn-hidden-size is 0"),
    ((*BRANCH, "--moe-recompute-modules", "all"), "--moe-recompute-modules is 'all'"),
    ((*BRANCH, "--num-experts", 4), "--moe-expert-count belongs"),
    ((*BRANCH, "--tokens-per-sample", 64, "--max-target-positions", 32), "--tokens-per-sample is 64"),
    ((*BRANCH, "--best-checkpoint-metric", "bleu"), "--best-checkpoint-metric is bleu"),
    # Losses over tokens are logged as loss, and not as nll_loss besides.
    ((*TOPK, "--best-checkpoint-metric", "nll_loss"), "choose one of loss, ppl."),
]


def _all_commands(
    rank: int, save_dir: str, indices: list[int], mutation: bool
) -> list[tuple[Any, str, float]]:
    """Exit code, standard error and seconds of each command line."""
    from fairseq.tasks import register_task
    from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
    from fairseq_cli import train

    own_steps = type("OwnSteps", (LanguageModelingTask,), {"train_step": lambda self, *args: None})
    register_task("own_steps", dataclass=LanguageModelingConfig)(own_steps)
    if mutation:
        from fairseq_moe.stock.start import launch

        launch.moe_problems = lambda cfg, world_size: []
    found = []
    for index in indices:
        flags, _ = CASES[index]
        argv = [f"{save_dir}/no data", *PLUGIN, *BASE, *DENSE, "--save-dir", save_dir, *flags, *ALSO_BAD]
        sys.argv = ["fairseq-train", *map(str, argv)]
        said, start = io.StringIO(), time.monotonic()
        code: Any = 0
        with contextlib.redirect_stderr(said):
            try:
                train.cli_main()
            except SystemExit as stop:
                code = stop.code
            except Exception as error:
                code = f"{type(error).__name__}: {error}"
        found.append((code, said.getvalue(), time.monotonic() - start))
    return found


@functools.cache
def _outcomes(save_dir: str) -> list[tuple[Any, str, float]]:
    return run_ranks(_all_commands, 1, save_dir, list(range(len(CASES))), False, timeout=100)[0]


@pytest.fixture(scope="module")
def save_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where nothing may be written."""
    return tmp_path_factory.mktemp("bad-flags")


def _assert_refused(outcome: tuple[Any, str, float], sentence: str) -> None:
    code, said, seconds = outcome
    assert code == 2, said[-2000:]
    assert "fairseq_moe: error: " in said, said[-2000:]
    sentences = [line for line in said.splitlines() if line.startswith("fairseq_moe: error: ")]
    for part in (sentence, ALSO_BAD[0]):
        assert sum(part in line for line in sentences) >= 1, sentences
    assert "Traceback" not in said
    assert seconds < MAX_SEC


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: " ".join(map(str, CASES[index][0])))
def test_every_problem_is_a_sentence_before_data_is_read(index: int, save_dir: Path) -> None:
    """There is no data at the place that the command line names."""
    _assert_refused(_outcomes(str(save_dir))[index], CASES[index][1])
    assert list(save_dir.iterdir()) == []


def test_this_test_sees_flags_that_nobody_checks(save_dir: Path) -> None:
    [outcome] = run_ranks(_all_commands, 1, str(save_dir), [7], True, timeout=110)[0]
    with pytest.raises(AssertionError):
        _assert_refused(outcome, CASES[7][1])
