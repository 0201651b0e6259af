"""Parallel axes: mixes that must pass, and what is said at the start of flags that do nothing."""

from typing import Any

import pytest

from fairseq_moe.flags.moe import MoEConfig
from fairseq_moe.flags.parallel import Axes
from fairseq_moe.flags.parallel_checks import parallel_notes
from tests.helpers.parallel_flags import (
    BRANCH,
    C2,
    DENSE,
    E2,
    E4,
    LATENT,
    MODEL,
    OWN,
    P2,
    P4,
    PADDED,
    T2,
    T4,
    V2,
    X1,
    X2,
    ZERO_1,
    ZERO_3,
    problems,
)

# P, T, C, E, X and ranks of the mixes that must run
MIXES: list[tuple[str, dict[str, Any], int, Axes]] = [
    ("T2E2", T2 | E2 | X1, 2, Axes(2, 1, 2, 1)),
    ("T2X2", T2, 2, Axes(None, 2, 2, 1)),
    ("T2E2X2", T2 | E2, 4, Axes(2, 2, 2, 1)),
    ("C2E2", C2 | E2, 2, Axes(2, 1, 1, 2)),
    ("C2T2E4", C2 | T2 | E4 | X1, 4, Axes(4, 1, 2, 2)),
    ("C2T2E2X2", C2 | T2 | E2 | X2, 4, Axes(2, 2, 2, 2)),
    ("D2C2T2E2X2", C2 | T2 | E2 | X2, 8, Axes(2, 2, 2, 2)),
    ("D2T2E4", T2 | E4 | X1, 4, Axes(4, 1, 2, 1)),
    ("D2C2E2X2", C2 | E2 | X2, 4, Axes(2, 2, 1, 2)),
    ("D2C2E2", C2 | E2, 4, Axes(2, 1, 1, 2)),
    ("T4", T4 | X1, 4, Axes(None, 1, 4, 1)),
    ("T4X4", T4, 4, Axes(None, 4, 4, 1)),
    ("extended TP", T2 | E2 | {"moe_extended_tp": True}, 4, Axes(1, 4, 2, 1)),
    ("extended EP", T2 | E2 | {"moe_extended_ep": True}, 4, Axes(4, 1, 2, 1)),
    ("P2", P2, 2, Axes(pipe=2)),
    ("P4", P4, 4, Axes(pipe=4)),
    ("P2V2", P2 | V2, 2, Axes(pipe=2)),
    ("P2V2 by layers", P2 | {"num_layers_per_virtual_pipeline_stage": 1}, 2, Axes(pipe=2)),
    ("P2D2", P2, 4, Axes(pipe=2)),
    ("P2T2E2", P2 | T2 | E2 | X1, 4, Axes(2, 1, 2, 1, 2)),
    ("P2V2T2X2", P2 | V2 | T2, 4, Axes(None, 2, 2, 1, 2)),
    ("P2V2T2E2X2", P2 | V2 | T2 | E2, 8, Axes(2, 2, 2, 1, 2)),
    ("P2D2C2E2", P2 | C2 | E2, 8, Axes(2, 1, 1, 2, 2)),
    ("P2V2C2T2E2X2", P2 | V2 | C2 | T2 | E2 | X2, 8, Axes(2, 2, 2, 2, 2)),
    ("P2 extended TP", P2 | T2 | E2 | {"moe_extended_tp": True}, 8, Axes(1, 4, 2, 1, 2)),
]


@pytest.mark.parametrize("zero", [{}, ZERO_1, ZERO_3], ids=["copies", "zero-1", "zero-3"])
@pytest.mark.parametrize("blocks", [{}, OWN, LATENT], ids=["stock", "own", "latent"])
@pytest.mark.parametrize(("name", "mix", "ranks", "axes"), MIXES, ids=[name for name, *_ in MIXES])
def test_mixes_pass(
    name: str, mix: dict[str, Any], ranks: int, axes: Axes, blocks: dict[str, Any], zero: dict[str, Any]
) -> None:
    model = mix | blocks | zero
    assert problems(model, ranks=ranks) == []
    assert MoEConfig.from_args(MODEL | model).axes == axes


@pytest.mark.parametrize(
    ("model", "run"),
    [
        ({"tensor_model_parallel_size": 1, "context_parallel_size": 1}, {"backend": "pytorch_ddp"}),
        (DENSE | {"tensor_model_parallel_size": 1, "context_parallel_size": 1}, {}),
        ({"sequence_parallel": True, "tp_comm_overlap": True}, {"criterion": "cross_entropy"}),
        ({"decoder_normalize_before": False, "scale_attn": True}, {"optimizer": "lamb"}),
        (C2 | {"cp_comm_type": "all_gather", "decoder_attention_heads": 1}, {"optimizer": "lamb"}),
        (T2 | {"decoder_ffn_embed_dim": 33, "moe_ffn_hidden_size": 16, "moe_layer_freq": "1"}, {}),
        (T2 | {"moe_shared_expert_intermediate_size": 33, "fused_attention": True}, {}),
        (BRANCH | T2 | {"moe_expert_ffn_dim": 33}, {}),  # the branch's experts stay whole
        (BRANCH | T2 | X2 | C2, {}),
        (C2 | PADDED, {}),
        (C2 | {"decoder_input_dim": 16, "decoder_output_dim": 16}, {}),
        (T2 | X1 | PADDED, {}),
        (T2 | {"mtp_layers": 1}, {}),  # kept as they are, not computed
        (T2 | {"moe_router_load_balancing_type": "quantile_balancing"}, {}),
        (T2 | E2 | {"moe_extended_tp": True, "moe_token_dispatcher_type": "allgather"}, {}),
        (T2 | ZERO_1, {"backend": "pytorch_ddp"}),  # its place is taken
        (C2 | ZERO_3, {"backend": "pytorch_ddp"}),
        ({"pipeline_model_parallel_size": 1} | {"num_virtual_stages_per_pipeline_rank": 1}, {}),
        ({"num_layers_per_virtual_pipeline_stage": 4}, {}),  # all of them
        (DENSE | {"pipeline_model_parallel_size": 1, "num_virtual_stages_per_pipeline_rank": 1}, {}),
        (P2 | LATENT | {"mtp_layers": 1, "mtp_loss_weight": 0.3}, {}),
        (P2 | OWN | V2 | {"mtp_layers": 1, "mtp_loss_weight": 0.3} | ZERO_3, {}),
        (P2 | {"decoder_normalize_before": False}, {}),
        (P2 | V2 | {"scale_attn": True, "scale_heads": True, "scale_resids": True}, {}),
        (P2 | {"moe_router_load_balancing_type": "expert_choice"}, {}),
        (P2 | {"moe_router_load_balancing_type": "sinkhorn"}, {}),
        (P2 | BRANCH | {"moe_freeze_modules": "routers experts"}, {}),
        (P2 | PADDED, {}),
        *((P2, {"criterion": name}) for name in ("cross_entropy", "label_smoothed_cross_entropy")),
        *((P2, {"optimizer": name}) for name in ("lamb", "adafactor", "lars")),  # a stage has whole tensors
        (P2 | ZERO_1, {"backend": "pytorch_ddp"}),
        (P4 | {"decoder_layers": 5, "decoder_first_pipeline_num_layers": 2}, {}),
        (P2 | V2 | {"decoder_layers": 6, "decoder_last_pipeline_num_layers": 2}, {}),
    ],
    ids=str,
)
def test_legal_configurations_pass(model: dict[str, Any], run: dict[str, Any]) -> None:
    assert problems(model, **run) == []


_OVERLAP, _TP, _EP = {"tp_comm_overlap": True}, {"moe_extended_tp": True}, {"moe_extended_ep": True}


@pytest.mark.parametrize(
    ("model", "note"),
    [
        (
            {"sequence_parallel": True},
            "--sequence-parallel does nothing without a --tensor-model-parallel-size above 1, as in Megatron.",
        ),
        (
            _OVERLAP,
            "--tp-comm-overlap does nothing without a --tensor-model-parallel-size above 1: there is nothing to "
            "overlap.",
        ),
        (
            T2 | _OVERLAP,
            "--tp-comm-overlap does nothing here: gathers and products would have to overlap by chunks, for which on a "
            "CPU both want the same cores, and which between GPUs nobody has measured yet.",
        ),
        (
            _TP,
            "--moe-extended-tp does nothing without a --tensor-model-parallel-size or --expert-model-parallel-size "
            "above 1: there is nothing to extend.",
        ),
        (
            _EP | E2,
            "--moe-extended-ep does nothing without a --tensor-model-parallel-size above 1: there is nothing to "
            "extend.",
        ),
        (
            T2 | E2 | _TP,
            "--moe-extended-tp does not need --moe-token-dispatcher-type allgather here: alltoall carries parts of "
            "experts by the same exchange as whole ones.",
        ),
        (
            C2 | {"fused_attention": True},
            "--fused-attention does nothing with --tensor-model-parallel-size or --context-parallel-size, whose "
            "attention uses torch's fused kernels anyway.",
        ),
    ],
    ids=str,
)
def test_what_does_nothing_is_said_once(model: dict[str, Any], note: str) -> None:
    assert list(parallel_notes(MODEL | model)) == [note]


@pytest.mark.parametrize("model", [{}, T2 | X1, T2 | E2 | _EP, C2, {"fused_attention": True}], ids=str)
def test_nothing_is_said_without_reason(model: dict[str, Any]) -> None:
    assert list(parallel_notes(MODEL | model)) == []
