"""Every configuration that cannot be honoured is refused with a sentence, all problems at once.

The flags of the table go through fairseq's own command line, so names and groups are those of stock.
"""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fairseq_moe.flags.moe import MoEConfig
from fairseq_moe.flags.moe_checks import moe_problems
from fairseq_moe.flags.stock import STOCK_FLAGS
from tests.helpers.ranks import REPOSITORY, USER_DIR, run_ranks

_GOOD = {"moe_freq": 2, "moe_expert_count": 4, "decoder_layers": 4}


def _problems(
    *,
    world_size: int = 2,
    criterion: dict[str, Any] | None = None,
    backend: str = "legacy_ddp",
    **model: Any,
) -> list[str]:
    cfg = SimpleNamespace(
        model=SimpleNamespace(**_GOOD | model),
        criterion=SimpleNamespace(**(criterion or {})),
        common=SimpleNamespace(
            fp16=False, memory_efficient_fp16=False, bf16=False, memory_efficient_bf16=False
        ),
        distributed_training=SimpleNamespace(ddp_backend=backend, fp32_reduce_scatter=False),
    )
    return moe_problems(cfg, world_size=world_size)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"moe_freq": -1}, "--moe-freq is -1, expected 0"),
        ({"moe_freq": 5}, "--moe-freq is 5, expected 0 (no experts) to 4"),
        ({"moe_freq": 0}, "--moe-expert-count is 4 but --moe-freq is 0"),
        ({"moe_expert_count": 1}, "--moe-expert-count is 1, but top-2 routing needs at least 2 experts"),
        ({"moe_expert_count": 0}, "--moe-expert-count is 0, but top-2"),
        ({"moe_expert_count": -4}, "--moe-expert-count is -4, but top-2"),
        ({"moe_expert_count": 0, "moe_top1_expert": True}, "--moe-expert-count is 0, but top-1"),
        ({"moe_expert_count": 3}, "3 experts do not fit 2 ranks"),
        ({"moe_second_expert_policy": "best"}, "'best', expected one of sampling, random, all"),
        ({"moe_normalize_expert_grad": "none"}, "'none', expected one of world_size, sqrt_world_size"),
        ({"moe_expert_ffn_dim": 0}, "--moe-expert-ffn-dim is 0, expected a positive width"),
        ({"moe_expert_ffn_dim": -8}, "--moe-expert-ffn-dim is -8"),
        ({"alternate_decoder_ffn_embed_dim": -1}, "--alternate-decoder-ffn-embed-dim is -1"),
        ({"moe_eval_capacity_token_fraction": 1.5}, "--moe-eval-capacity-token-fraction is 1.5"),
        ({"moe_eval_capacity_token_fraction": math.nan}, "--moe-eval-capacity-token-fraction is nan"),
        ({"moe_eval_capacity_token_fraction": math.inf}, "--moe-eval-capacity-token-fraction is inf"),
        ({"moe_generation_capacity_token_fraction": 2.0}, "--moe-generation-capacity-token-fraction is 2.0"),
        ({"moe_generation_capacity_token_fraction": math.nan}, "-generation-capacity-token-fraction is nan"),
        ({"use_stable_embedding": True}, "--use-stable-embedding is not supported"),
        ({"use_stable_embedding": True, "moe_freq": 0, "moe_expert_count": 0}, "--use-stable-embedding"),
    ],
)
def test_value_is_refused(model: dict[str, Any], sentence: str) -> None:
    (problem,) = _problems(**model)
    assert sentence in problem
    assert problem.endswith(".")


@pytest.mark.parametrize("weight", [math.nan, math.inf, -0.1])
def test_weight_of_the_gate_loss_is_refused(weight: float) -> None:
    (problem,) = _problems(criterion={"moe_gate_loss_wt": weight})
    assert problem.startswith(f"--moe-gate-loss-wt is {weight}, expected a finite weight")


@pytest.mark.parametrize(
    ("experts", "ranks", "fits"),
    [(4, 1, True), (4, 4, True), (8, 4, True), (4, 8, True), (4, 3, False), (6, 4, False), (4, 6, False)],
)
def test_experts_and_ranks_divide_one_another(experts: int, ranks: int, fits: bool) -> None:
    problems = _problems(world_size=ranks, moe_expert_count=experts)
    assert problems == [] if fits else f"{experts} experts do not fit {ranks} ranks" in problems[0]


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"moe_freq": 0, "moe_expert_count": 0},
        {"moe_freq": 4, "moe_expert_count": 2, "moe_second_expert_policy": "random"},
        {"moe_top1_expert": True, "moe_expert_count": 1},
        {"moe_eval_capacity_token_fraction": 0.0},
        {"moe_eval_capacity_token_fraction": -1.0, "moe_generation_capacity_token_fraction": 1.0},
        {"moe_expert_count": 0, "alternate_decoder_ffn_embed_dim": 8},
        {"moe_normalize_expert_grad": "sqrt_world_size", "moe_expert_ffn_dim": 1},
    ],
)
def test_legal_configurations_pass(model: dict[str, Any]) -> None:
    assert _problems(**model) == []


def test_all_problems_are_named_at_once() -> None:
    problems = _problems(
        moe_freq=9, moe_second_expert_policy="best", moe_expert_count=3, criterion={"moe_gate_loss_wt": -1.0}
    )
    assert len(problems) == 4


def test_configuration_without_a_model_has_no_problem() -> None:
    assert moe_problems(SimpleNamespace(model=None, criterion=None), world_size=3) == []


def test_fields_are_read_from_mappings_and_objects() -> None:
    assert MoEConfig.from_args({"moe_freq": 2}) == MoEConfig.from_args(SimpleNamespace(moe_freq=2))


# --- the table of stock flags ---

_MOE_ARGV = [
    *("data", "--user-dir", str(USER_DIR), "--task", "language_modeling", "--arch", "transformer_lm_gpt"),
    *("--moe-freq", "2", "--moe-expert-count", "4", "--criterion", "moe_cross_entropy", "--batch-size", "1"),
    *("--tokens-per-sample", "16", "--optimizer", "adam"),
]
_IN_USE = {
    "--ddp-backend slowmo": ["--ddp-backend", "slowmo"],
    "--write-checkpoints-asynchronously": ["--write-checkpoints-asynchronously"],
    "--decoder-layerdrop": ["--decoder-layerdrop", "0.1"],
    "--store-ema": ["--store-ema"],
    "--amp": ["--amp"],
    "--use-bmuf": ["--use-bmuf"],
    "--zero-sharding": ["--zero-sharding", "os"],
    "--cpu-offload": ["--cpu-offload", "--ddp-backend", "fully_sharded"],
    "--offload-activations": ["--offload-activations"],
    "--use-sharded-state": ["--use-sharded-state", "--ddp-backend", "fully_sharded"],
    "--not-fsdp-flatten-parameters": ["--not-fsdp-flatten-parameters", "--ddp-backend", "fully_sharded"],
    "--quant-noise-pq": ["--quant-noise-pq", "0.1"],
    "--quant-noise-scalar": ["--quant-noise-scalar", "0.1"],
    "--quantization-config-path": ["--quantization-config-path", "quantization.yaml"],
    "--base-layers": ["--base-layers", "1"],
    "--adaptive-softmax-cutoff": ["--adaptive-softmax-cutoff", "100,200"],
    "--adaptive-input": ["--adaptive-input"],
    "--character-embeddings": ["--character-embeddings"],
    "--scale-fc": ["--scale-fc"],
    "--pipeline-model-parallel": ["--pipeline-model-parallel"],
    "--pipeline-balance": ["--pipeline-balance", "[1,1]"],
    "--pipeline-devices": ["--pipeline-devices", "[0,1]"],
    "--pipeline-chunks": ["--pipeline-chunks", "4"],
    "--model-parallel-size": ["--model-parallel-size", "2"],
    "--tpu": ["--tpu"],
    "--fp16": ["--fp16"],
}
_ACCEPTED = {
    "--ddp-backend legacy_ddp": ["--ddp-backend", "legacy_ddp"],
    "--ddp-backend pytorch_ddp": ["--ddp-backend", "pytorch_ddp"],
    "--ddp-backend fully_sharded": ["--ddp-backend", "fully_sharded", "--fp16"],
    "--update-freq": ["--update-freq", "2"],
    "--clip-norm": ["--clip-norm", "1.0"],
    "--checkpoint-activations": ["--checkpoint-activations"],
    "--fp16 --fp16-no-flatten-grads": ["--fp16", "--fp16-no-flatten-grads"],
    "--memory-efficient-fp16": ["--memory-efficient-fp16"],
    "--bf16, --memory-efficient-bf16": ["--bf16"],
    "--fp16-adam-stats": ["--fp16-adam-stats", "--memory-efficient-fp16"],
}
# Ours, beside what stock's architecture says of the layers.
_AXES = {
    "--tensor-model-parallel-size": [
        *("--tensor-model-parallel-size", "2", "--sequence-parallel", "--ddp-backend", "legacy_ddp")
    ],
    "--context-parallel-size": ["--context-parallel-size", "2", "--use-distributed-optimizer"],
    "--pipeline-model-parallel-size": [
        *("--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"),
        *("--update-freq", "2", "--ddp-backend", "legacy_ddp"),
    ],
}


@pytest.fixture(scope="module")
def problems_of_flags() -> dict[str, list[str]]:
    """For each entry of the tables, what a command line with it is told."""
    (found,) = run_ranks(_parse_all, 1, {**_IN_USE, **_ACCEPTED, **_AXES}, timeout=110)
    return found


def _parse_all(rank: int, flags: dict[str, list[str]]) -> dict[str, list[str]]:
    import sys

    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    found = {}
    for name, argv in flags.items():
        sys.argv = ["fairseq-train", *_MOE_ARGV, *argv]
        args = options.parse_args_and_arch(options.get_training_parser())
        found[name] = moe_problems(convert_namespace_to_omegaconf(args), world_size=2)
    return found


@pytest.mark.parametrize("flag", _IN_USE)
def test_stock_flag_is_refused_on_the_command_line(
    flag: str, problems_of_flags: dict[str, list[str]]
) -> None:
    assert any(flag in problem and problem.endswith(".") for problem in problems_of_flags[flag])
    assert len(problems_of_flags[flag]) == 1, problems_of_flags[flag]


@pytest.mark.parametrize("flag", [*_ACCEPTED, *_AXES])
def test_flag_is_accepted_on_the_command_line(flag: str, problems_of_flags: dict[str, list[str]]) -> None:
    assert problems_of_flags[flag] == []


def test_tables_of_this_test_cover_the_flags() -> None:
    assert {row.flag for row in STOCK_FLAGS if row.reason} == _IN_USE.keys() - {"--fp16"}
    assert {row.flag for row in STOCK_FLAGS if not row.reason} == _ACCEPTED.keys()


@pytest.mark.parametrize("row", [row for row in STOCK_FLAGS if not row.reason], ids=lambda row: row.flag)
def test_supported_flag_names_the_test_that_shows_it(row: Any) -> None:
    assert row.test
    assert (Path(REPOSITORY) / row.test).is_file()


HALVES = {"expert_tensor_parallel_size": 2, "decoder_ffn_embed_dim": 12}
MEGATRON = {"moe_freq": 0, "moe_expert_count": 0, "num_experts": 4, "moe_router_topk": 2}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (HALVES | {"decoder_ffn_embed_dim": 13}, "does not divide the experts' width 13"),
        (HALVES | {"moe_expert_ffn_dim": 9}, "does not divide the experts' width 9"),
        (HALVES | {"backend": "fully_sharded"}, "use --use-torch-fsdp2 in its place."),
        (HALVES | {"expert_tensor_parallel_size": 0}, "is 0, expected a divisor of the 2 ranks."),
        (HALVES | {"expert_tensor_parallel_size": 3}, "is 3, expected a divisor of the 2 ranks."),
        (
            HALVES | MEGATRON | {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
            "which --moe-pad-expert-input-to-capacity does not count",
        ),
        (
            HALVES | MEGATRON | {"moe_token_dispatcher_type": "allgather", "dropout": 0.1},
            "set --dropout 0, or leave the dispatcher out.",
        ),
    ],
)
def test_experts_that_cannot_be_divided_are_refused(flags: dict[str, Any], sentence: str) -> None:
    found = _problems(**flags)
    assert any(problem.endswith(sentence) or sentence in problem for problem in found), found
    assert _problems(**HALVES) == []
    assert _problems(**HALVES, **MEGATRON, moe_token_dispatcher_type="allgather") == []
