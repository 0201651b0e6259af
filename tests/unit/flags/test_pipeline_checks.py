"""Pipelines: each refusal of their flags with its whole sentence."""

from typing import Any

import pytest

from tests.helpers.parallel_flags import (
    C2,
    DENSE,
    E4,
    P2,
    P4,
    T2,
    V2,
    X1,
    X2,
    ZERO_1,
    ZERO_3,
    problems,
)

FIRST, LAST = "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"
PER_STAGE = "num_layers_per_virtual_pipeline_stage"

# flags of the model, what else there is, the sentence
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    *(
        ({name: value}, {}, f"--{name.replace('_', '-')} is {value}, expected at least 1.")
        for name in ("pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank", PER_STAGE)
        for value in (0, -1)
    ),
    (P2 | {FIRST: 0}, {}, "--decoder-first-pipeline-num-layers is 0, expected at least 1."),
    (
        V2,
        {},
        "--num-virtual-stages-per-pipeline-rank needs several pipeline ranks; give --pipeline-model-parallel-size "
        "above 1 too, or drop it.",
    ),
    (
        {PER_STAGE: 2},
        {},
        "--num-layers-per-virtual-pipeline-stage needs several pipeline ranks; give --pipeline-model-parallel-size "
        "above 1 too, or drop it.",
    ),
    (
        {LAST: 2},
        {},
        "--decoder-last-pipeline-num-layers needs several pipeline ranks; give --pipeline-model-parallel-size above 1 "
        "too, or drop it.",
    ),
    (
        P2 | V2 | {PER_STAGE: 1},
        {},
        "--num-virtual-stages-per-pipeline-rank and --num-layers-per-virtual-pipeline-stage are two ways to say the "
        "same; give one of them.",
    ),
    (
        P2 | {PER_STAGE: 1, FIRST: 2},
        {},
        "--num-layers-per-virtual-pipeline-stage does not say how to cut ranks of different sizes "
        "(--decoder-first-pipeline-num-layers); give --num-virtual-stages-per-pipeline-rank instead.",
    ),
    (
        {"pipeline_model_parallel_size": 8},
        {},
        "--pipeline-model-parallel-size is 8, expected at most the 4 layers; each rank needs one.",
    ),
    (
        P4 | V2,
        {},
        "--pipeline-model-parallel-size 4 times --num-virtual-stages-per-pipeline-rank 2 is 8 stages, expected at most "
        "the 4 layers; each stage needs one.",
    ),
    (
        P2 | {"decoder_layers": 5},
        {},
        "5 layers do not divide by --pipeline-model-parallel-size 2; choose a divisor, or give the end ranks layers of "
        "their own by --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers.",
    ),
    (
        P2 | V2 | {"decoder_layers": 6},
        {},
        "--num-virtual-stages-per-pipeline-rank is 2, expected a divisor of the 3 layers of pipeline rank 0.",
    ),
    (
        P2 | {PER_STAGE: 2, "decoder_layers": 6},
        {},
        "--num-layers-per-virtual-pipeline-stage is 2, expected a divisor of the 3 layers of each rank.",
    ),
    (
        P4 | {FIRST: 2, LAST: 2},
        {},
        "With --decoder-first-pipeline-num-layers 2 and --decoder-last-pipeline-num-layers 2, 0 of 4 layers are for "
        "the other 2 of 4 pipeline ranks, expected a multiple of 2 above 0; change one of these numbers.",
    ),
    (
        P2 | {FIRST: 2, LAST: 3},
        {},
        "--decoder-first-pipeline-num-layers 2 and --decoder-last-pipeline-num-layers 3 are all 2 ranks, expected 4 "
        "layers in sum.",
    ),
    (P2, {"ranks": 3}, "--pipeline-model-parallel-size is 2, expected a divisor of the 3 ranks."),
    (P2, {"ranks": 1}, "--pipeline-model-parallel-size is 2, expected a divisor of the 1 ranks."),
    (
        P2 | T2 | X1 | C2,
        {"ranks": 4},
        "--tensor-model-parallel-size 2 times --context-parallel-size 2 is 4, expected a divisor of the 2 ranks of a "
        "pipeline stage.",
    ),
    (
        P2 | X2,
        {"ranks": 2},
        "--expert-tensor-parallel-size is 2, expected a divisor of the 1 ranks of a pipeline stage.",
    ),
    (
        P2 | E4,
        {"ranks": 4},
        "--expert-model-parallel-size is 4, expected a divisor of both the 8 experts and the 2 ranks of a pipeline "
        "stage.",
    ),
    (
        P2 | T2 | E4,
        {"ranks": 8},
        "--expert-model-parallel-size is 4, expected a divisor of both the 8 experts and the 2 ranks (4 ranks of a "
        "pipeline stage, 2 for each expert); each expert is divided as all else is, unless "
        "--expert-tensor-parallel-size 1 is given.",
    ),
    (
        P2 | {"num_experts": 3},
        {"ranks": 4},
        "3 experts do not fit 2 ranks of a pipeline stage: one of the two numbers must be a multiple of the other; "
        "choose another --moe-expert-count (--num-experts), another number of ranks, or give "
        "--expert-model-parallel-size.",
    ),
    *(
        (
            P2 | more,
            {"backend": backend},
            f"--ddp-backend {backend} sums all gradients over all ranks, which is wrong with {axis}; use --ddp-backend "
            "legacy_ddp, --use-distributed-optimizer or --use-torch-fsdp2.",
        )
        for backend in ("pytorch_ddp", "c10d", "fully_sharded")
        for more, axis in (
            ({}, "--pipeline-model-parallel-size 2"),
            (X2, "--pipeline-model-parallel-size 2"),
            (C2, "--context-parallel-size 2"),
        )
    ),
    (
        P2 | ZERO_1,
        {"backend": "fully_sharded"},
        "--ddp-backend fully_sharded sums all gradients over all ranks, which is wrong with "
        "--pipeline-model-parallel-size 2; use --ddp-backend legacy_ddp, --use-distributed-optimizer or "
        "--use-torch-fsdp2.",
    ),
    (
        P2,
        {"heartbeat_timeout": 60},
        "--heartbeat-timeout 60 is not there with --pipeline-model-parallel-size 2; leave it out: "
        "--collective-timeout-sec ends a run that waits.",
    ),
    (
        P2,
        {"criterion": "masked_lm"},
        "--criterion masked_lm may ask a model for more than its output, which is all that a last stage has with "
        "--pipeline-model-parallel-size 2; use --criterion moe_cross_entropy.",
    ),
    (
        P2 | C2,
        {"criterion": "masked_lm"},
        "--criterion masked_lm does not know that a rank has a part of each micro-batch with --context-parallel-size "
        "2; use --criterion moe_cross_entropy.",
    ),
    (
        P2,
        {"optimizer": "fused_lamb"},
        "--optimizer fused_lamb clips gradients by the norm of those of its rank, which is another one on each stage "
        "with --pipeline-model-parallel-size 2; choose lamb, adam or another one that does not clip by itself.",
    ),
    (
        P2 | T2 | X1,
        {"optimizer": "fused_lamb"},
        "--optimizer fused_lamb looks at whole tensors, of which a rank holds a part with --tensor-model-parallel-size "
        "2; choose adam, sgd or another one that steps each number by itself.",
    ),
    (
        P2 | ZERO_3,
        {"optimizer": "fused_lamb"},
        "--optimizer fused_lamb looks at whole tensors, of which a rank holds a part with --use-torch-fsdp2; choose "
        "adam, sgd or another one that steps each number by itself.",
    ),
    *(
        (
            DENSE | flags,
            {},
            f"{names}: no layer has experts, and only models with experts are split so.",
        )
        for flags, names in (
            (P2, "--pipeline-model-parallel-size"),
            (V2, "--num-virtual-stages-per-pipeline-rank"),
            (
                P2 | {FIRST: 1},
                "--pipeline-model-parallel-size, --decoder-first-pipeline-num-layers",
            ),
        )
    ),
    (
        P2 | T2 | {"mtp_layers": 1, "mtp_loss_weight": 0.3},
        {},
        "--mtp-loss-weight needs every position's next tokens, of which a rank has a part with "
        "--tensor-model-parallel-size 2; leave one out.",
    ),
]


@pytest.mark.parametrize(("model", "run", "sentence"), REFUSED, ids=str)
def test_refused(model: dict[str, Any], run: dict[str, Any], sentence: str) -> None:
    assert problems(model, **run) == [sentence]


def test_all_problems_are_named_at_once() -> None:
    run = {"backend": "pytorch_ddp", "criterion": "x", "optimizer": "fused_lamb", "heartbeat_timeout": 9}
    assert len(set(problems(P2 | {"decoder_layers": 5}, ranks=3, **run))) == 6
