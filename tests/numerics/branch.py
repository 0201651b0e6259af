"""The golden run of fairseq's moe branch: where its files are and the flags that made its numbers."""

import json
from pathlib import Path
from typing import Any

from tests.helpers.ranks import REPOSITORY, USER_DIR

__all__ = ["CHECKPOINT", "DATA", "EVAL_FLAGS", "TRAIN_FLAGS", "expected"]

_GOLDEN = REPOSITORY / "tests" / "golden" / "moe_branch"
DATA: Path = _GOLDEN / "bin"
CHECKPOINT: Path = _GOLDEN / "checkpoint_last.pt"  # the branch's name for its three files

EVAL_FLAGS = (
    "--gen-subset valid --is-moe --batch-size 1 --tokens-per-sample 64 --sample-break-mode none "
    f"--required-batch-size-multiple 1 --user-dir {USER_DIR} --cpu --num-workers 0"
).split()

TRAIN_FLAGS = (
    "--task language_modeling --tokens-per-sample 256 --sample-break-mode none "
    "--required-batch-size-multiple 1 --arch transformer_lm_gpt --share-decoder-input-output-embed "
    "--decoder-layers 4 --decoder-embed-dim 64 --decoder-ffn-embed-dim 256 --decoder-attention-heads 4 "
    "--moe-expert-count 4 --moe-freq 2 --moe-gating-use-fp32 --moe-second-expert-policy all "
    "--moe-normalize-expert-grad sqrt_world_size --moe-eval-capacity-token-fraction -1.0 "
    "--criterion moe_cross_entropy --moe-gate-loss-wt 0.01 --moe-gate-loss-combine-method sum "
    "--clip-norm 0.0 --lr-scheduler fixed --dropout 0.0 --attention-dropout 0.0 --batch-size 1 "
    "--update-freq 1 --seed 7 --num-workers 0 --disable-validation --ddp-backend legacy_ddp --cpu "
    "--log-format json --log-interval 1 --reset-optimizer --reset-dataloader --reset-meters "
    f"--reset-lr-scheduler --user-dir {USER_DIR} --no-save"
).split()


def expected() -> dict[str, Any]:
    """What the branch computed; see the README beside the file."""
    return json.loads((_GOLDEN / "expected.json").read_text(encoding="utf-8"))
