"""Parallel axes: each refusal with its whole sentence."""

from typing import Any

import pytest

from tests.helpers.parallel_flags import (
    BRANCH,
    C2,
    DENSE,
    E2,
    E4,
    LATENT,
    OWN,
    PADDED,
    T2,
    T4,
    X1,
    X2,
    ZERO_1,
    problems,
)

# flags of the model, what else there is, the sentence
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"tensor_model_parallel_size": 0}, {}, "--tensor-model-parallel-size is 0, expected at least 1."),
    ({"context_parallel_size": -2}, {}, "--context-parallel-size is -2, expected at least 1."),
    (
        {"tensor_model_parallel_size": 2},
        {},
        "--tensor-model-parallel-size 2 needs --sequence-parallel, so that every router and dropout sees tokens of its "
        "own; add it.",
    ),
    (
        C2 | {"cp_comm_type": "p2p"},
        {},
        "--cp-comm-type is 'p2p', expected all_gather, the one way there is to see the keys and values of other ranks.",
    ),
    (
        {"cp_comm_type": "all_gather"},
        {},
        "--cp-comm-type needs a --context-parallel-size above 1; leave it out.",
    ),
    (
        T2 | {"decoder_attention_heads": 5},
        {},
        "--tensor-model-parallel-size 2 does not divide --decoder-attention-heads 5; choose a divisor.",
    ),
    (
        T4 | {"decoder_kv_heads": 2},
        {},
        "--tensor-model-parallel-size 4 does not divide --decoder-kv-heads 2; choose a divisor.",
    ),
    (
        T4 | LATENT | {"decoder_attention_heads": 6},
        {},
        "--tensor-model-parallel-size 4 does not divide --decoder-attention-heads 6; choose a divisor.",
    ),
    (
        T2 | {"decoder_ffn_embed_dim": 33, "moe_ffn_hidden_size": 16},
        {},
        "--tensor-model-parallel-size 2 does not divide --decoder-ffn-embed-dim 33; choose a divisor.",
    ),
    (
        BRANCH | T2 | {"decoder_ffn_embed_dim": 33, "moe_expert_ffn_dim": 16},
        {},
        "--tensor-model-parallel-size 2 does not divide --decoder-ffn-embed-dim 33; choose a divisor.",
    ),
    (
        T2 | {"moe_ffn_hidden_size": 33},
        {},
        "--tensor-model-parallel-size 2, which divides each expert, too, does not divide the experts' width 33; choose "
        "a divisor, or add --expert-tensor-parallel-size 1.",
    ),
    (
        C2 | X2 | {"moe_ffn_hidden_size": 33},
        {},
        "--expert-tensor-parallel-size 2 does not divide the experts' width 33; choose a divisor.",
    ),
    (
        T2 | E2 | {"moe_extended_tp": True, "moe_ffn_hidden_size": 34},
        {},
        "--moe-extended-tp, which divides each expert over 4 ranks, does not divide the experts' width 34; choose a "
        "divisor.",
    ),
    (
        T2 | {"context_parallel_size": 3},
        {},
        "--tensor-model-parallel-size 2 times --context-parallel-size 3 is 6, expected a divisor of the 8 ranks.",
    ),
    (
        T2 | X1,
        {"ranks": 1},
        "--tensor-model-parallel-size 2 times --context-parallel-size 1 is 2, expected a divisor of the 1 ranks.",
    ),
    (
        C2 | {"expert_tensor_parallel_size": 3, "moe_ffn_hidden_size": 48},
        {},
        "--expert-tensor-parallel-size is 3, expected a divisor of the 8 ranks.",
    ),
    (
        C2 | X2 | {"expert_model_parallel_size": 8},
        {},
        "--expert-model-parallel-size is 8, expected a divisor of both the 8 experts and the 4 ranks (8 ranks, 2 for "
        "each expert).",
    ),
    (
        T2 | E2,
        {"ranks": 2},
        "--expert-model-parallel-size is 2, expected a divisor of both the 8 experts and the 1 ranks (2 ranks, 2 for "
        "each expert); each expert is divided as all else is, unless --expert-tensor-parallel-size 1 is given.",
    ),
    (
        T2 | E4 | {"moe_extended_tp": True},
        {"ranks": 4},
        "--moe-extended-tp divides each expert over 2 x 4 ranks (tensor x expert): --expert-tensor-parallel-size is 8, "
        "expected a divisor of the 4 ranks.",
    ),
    (
        T2 | E4 | {"moe_extended_ep": True},
        {"ranks": 4},
        "--moe-extended-ep spreads experts over 2 x 4 ranks (tensor x expert): --expert-model-parallel-size is 8, "
        "expected a divisor of both the 8 experts and the 4 ranks.",
    ),
    (
        T2 | {"expert_model_parallel_size": 0},
        {},
        "--expert-model-parallel-size is 0, expected a divisor of both the 8 experts and the 4 ranks (8 ranks, 2 for "
        "each expert).",
    ),
    *(
        (
            axis | {name: value},
            {},
            f"--{name.replace('_', '-')} changes stock's blocks, which {flag} 2 replaces; leave one out.",
        )
        for axis, flag in ((T2, "--tensor-model-parallel-size"), (C2, "--context-parallel-size"))
        for name, value in (
            ("scale_attn", True),
            ("scale_heads", True),
            ("scale_resids", True),
            ("decoder_xformers_att_config", "{}"),
        )
    ),
    (
        C2 | {"decoder_normalize_before": False},
        {},
        "--context-parallel-size 2 needs layers that normalise before each block; add --decoder-normalize-before.",
    ),
    (
        T2 | {"mtp_layers": 1, "mtp_loss_weight": 0.3},
        {},
        "--mtp-loss-weight needs every position's next tokens, of which a rank has a part with "
        "--tensor-model-parallel-size 2; leave one out.",
    ),
    *(
        (
            axis | {"moe_router_load_balancing_type": kind},
            {},
            f"--moe-router-load-balancing-type {kind} looks at all tokens of a batch, of which a rank has a part with "
            f"{flag} 2; choose another type.",
        )
        for axis, flag in ((T2, "--tensor-model-parallel-size"), (C2, "--context-parallel-size"))
        for kind in ("expert_choice", "sinkhorn")
    ),
    (
        C2 | X2 | PADDED,
        {},
        "--expert-tensor-parallel-size 2 sends each row to 2 ranks, which --moe-pad-expert-input-to-capacity does not "
        "count; leave one of the two out.",
    ),
    (
        T2 | PADDED,
        {},
        "--tensor-model-parallel-size 2, which divides each expert, too, sends each row to 2 ranks, which "
        "--moe-pad-expert-input-to-capacity does not count; leave one of the two out, or add "
        "--expert-tensor-parallel-size 1.",
    ),
    (
        T2 | {"moe_token_dispatcher_type": "allgather", "dropout": 0.1},
        {},
        "--tensor-model-parallel-size 2, which divides each expert, too, with --moe-token-dispatcher-type allgather "
        "adds up experts before their outputs could be dropped; set --dropout 0, or leave the dispatcher out, or add "
        "--expert-tensor-parallel-size 1.",
    ),
    *(
        (
            axis,
            {"backend": backend},
            f"--ddp-backend {backend} sums all gradients over all ranks, which is wrong with {flag}; use --ddp-backend "
            "legacy_ddp, --use-distributed-optimizer or --use-torch-fsdp2.",
        )
        for axis, flag in ((T2, "--tensor-model-parallel-size 2"), (C2, "--context-parallel-size 2"))
        for backend in ("pytorch_ddp", "c10d", "fully_sharded")
    ),
    (
        C2 | ZERO_1,
        {"backend": "fully_sharded"},
        "--ddp-backend fully_sharded sums all gradients over all ranks, which is wrong with --context-parallel-size 2; "
        "use --ddp-backend legacy_ddp, --use-distributed-optimizer or --use-torch-fsdp2.",
    ),
    (
        X2,
        {"backend": "fully_sharded"},
        "--expert-tensor-parallel-size 2 does not go with --ddp-backend fully_sharded, which flattens what lies on the "
        "ranks in different ways; use --use-torch-fsdp2 in its place.",
    ),
    (
        C2,
        {"heartbeat_timeout": 60},
        "--heartbeat-timeout 60 is not there with --context-parallel-size 2; leave it out: --collective-timeout-sec "
        "ends a run that waits.",
    ),
    (
        C2,
        {"criterion": "cross_entropy"},
        "--criterion cross_entropy does not know that a rank has a part of each micro-batch with "
        "--context-parallel-size 2; use --criterion moe_cross_entropy.",
    ),
    (
        T2 | {"moe_extended_tp": True, "moe_extended_ep": True},
        {},
        "--moe-extended-tp divides experts that --moe-extended-ep leaves whole; choose one.",
    ),
    *(
        (
            T2 | X1 | {name: True},
            {},
            f"--{name.replace('_', '-')} sets over how many ranks each expert is divided, and so does "
            "--expert-tensor-parallel-size; leave one out.",
        )
        for name in ("moe_extended_tp", "moe_extended_ep")
    ),
    *(
        (
            model,
            {"optimizer": optimizer},
            f"--optimizer {optimizer} looks at whole tensors, of which a rank holds a part with {flag}; choose adam, "
            "sgd or another one that steps each number by itself.",
        )
        for optimizer in ("adafactor", "lamb", "composite")
        for model, flag in (
            (T2 | X1, "--tensor-model-parallel-size 2"),
            (X2, "--expert-tensor-parallel-size"),
            (E2 | {"moe_extended_tp": True}, "--moe-extended-tp"),
        )
    ),
    (
        T2 | X1 | ZERO_1,
        {"optimizer": "lamb"},
        "--optimizer lamb looks at whole tensors, of which a rank holds a part with --use-distributed-optimizer; "
        "choose adam, sgd or another one that steps each number by itself.",
    ),
    *(
        (
            DENSE | axis,
            {},
            f"{names}: no layer has experts, and only models with experts are split so.",
        )
        for axis, names in (
            (T2, "--tensor-model-parallel-size, --sequence-parallel"),
            (OWN | C2, "--context-parallel-size"),
            ({"sequence_parallel": True}, "--sequence-parallel"),
            ({"tp_comm_overlap": True}, "--tp-comm-overlap"),
            ({"moe_extended_ep": True}, "--moe-extended-ep"),
        )
    ),
]


@pytest.mark.parametrize(("model", "run", "sentence"), REFUSED, ids=str)
def test_refused(model: dict[str, Any], run: dict[str, Any], sentence: str) -> None:
    assert problems(model, **run) == [sentence]


def test_all_problems_are_named_at_once() -> None:
    model = {"tensor_model_parallel_size": 3, "cp_comm_type": "a2a", "scale_attn": True, "mtp_layers": 1}
    model |= {"mtp_loss_weight": 1.0, "moe_router_load_balancing_type": "sinkhorn"}
    run = {
        "backend": "pytorch_ddp",
        "criterion": "cross_entropy",
        "optimizer": "lars",
        "heartbeat_timeout": 9,
    }
    found = problems(model, **run)
    # 3 does not divide 8 ranks, 4 heads, width 64 (dense, and of experts); no --sequence-parallel; the eight above.
    assert len(found) == len(set(found)) == 13
