"""Megatron's arguments as typed, through fairseq's command line and through hydra; their warnings."""

import sys
from dataclasses import fields
from typing import Any

import pytest

from fairseq_moe.flags.megatron import MegatronConfig
from fairseq_moe.flags.megatron_aliases import MEGATRON_ARGS, argument_problems, argument_warnings
from fairseq_moe.flags.moe import MoEConfig
from fairseq_moe.flags.parallel import ParallelConfig
from fairseq_moe.flags.sharding import ShardingConfig
from tests.helpers.ranks import REPOSITORY, USER_DIR, run_ranks

_ARGV = [
    *("data", "--user-dir", str(USER_DIR), "--task", "language_modeling", "--arch", "transformer_lm_gpt"),
    *(
        "--decoder-layers",
        "4",
        "--criterion",
        "moe_cross_entropy",
        "--batch-size",
        "3",
        "--tokens-per-sample",
        "16",
    ),
    *("--optimizer", "adam"),
]
_EXPERTS = ["--num-experts", "8"]
_T2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--tp-comm-overlap"]
_SIGMOID = ["--moe-router-score-function", "sigmoid"]

# command line -> values of MoEConfig that it gives, by their path
_COMMAND_LINES: list[tuple[list[str], dict[str, Any]]] = [
    (_EXPERTS, {"num_experts": 8, "top_k": 2, "loss_coefficients": {}}),
    (["--moe-freq", "2", "--moe-expert-count", "4"], {"num_experts": 4, "megatron.selected": False}),
    (
        [
            *_EXPERTS,
            "--moe-router-load-balancing-type",
            "aux_loss",
            "seq_aux_loss",
            "--moe-aux-loss-coeff",
            "0.1",
            "2e-2",
        ],
        {"loss_coefficients": {"aux": 0.1, "seq_aux": 0.02}},
    ),
    (
        [
            *_EXPERTS,
            "--moe-router-load-balancing-type",
            "aux_loss,seq_aux_loss",
            "--moe-aux-loss-coeff",
            "0.1,0.2",
        ],
        {"loss_coefficients": {"aux": 0.1, "seq_aux": 0.2}},
    ),
    (
        [*_EXPERTS, "--moe-aux-loss-coeff", "0.01", "--moe-z-loss-coeff", "0.001"],
        {"loss_coefficients": {"aux": 0.01, "z": 0.001}},
    ),
    ([*_EXPERTS, "--moe-layer-freq", "([0]+[1]*3)"], {"megatron.moe_layer_freq": "([0]+[1]*3)"}),
    ([*_EXPERTS, "--moe-layer-freq", "2"], {"megatron.moe_layer_freq": "2"}),
    ([*_EXPERTS, "--moe-expert-capacity-factor", "1.25"], {"megatron.moe_expert_capacity_factor": 1.25}),
    ([*_EXPERTS, "--moe-expert-capacity-factor", "-1"], {"megatron.has_capacity": False}),
    ([*_EXPERTS, "--moe-token-capacity-factor", "1.25"], {"megatron.moe_expert_capacity_factor": 1.25}),
    ([*_EXPERTS, "--moe-token-dispatcher-type", "alltoall_seq"], {"megatron.dispatcher": "alltoall"}),
    (
        [*_EXPERTS, "--moe-token-dispatcher-type", "flex", "--moe-flex-dispatcher-backend", "hybridep"],
        {"megatron.dispatcher": "alltoall"},
    ),
    (
        [*_EXPERTS, "--moe-router-force-load-balancing"],
        {"megatron.moe_router_force_load_balancing": "random"},
    ),
    (
        [*_EXPERTS, "--moe-router-force-load-balancing", "hash"],
        {"megatron.moe_router_force_load_balancing": "hash"},
    ),
    (
        [*_EXPERTS, *_SIGMOID, "--moe-router-enable-expert-bias", "--moe-router-bias-update-rate", "0.01"],
        {"megatron.moe_router_enable_expert_bias": True, "megatron.moe_router_bias_update_rate": 0.01},
    ),
    (
        [*_EXPERTS, "--moe-router-topk", "4", "--moe-router-num-groups", "4", "--moe-router-group-topk", "2"],
        {"top_k": 4, "megatron.moe_router_num_groups": 4, "megatron.moe_router_group_topk": 2},
    ),
    (
        [*_EXPERTS, "--moe-expert-capacity-factor", "1", "--moe-pad-expert-input-to-capacity"],
        {"megatron.dispatcher": "padded", "max_tokens": 3 * 17},
    ),
    ([*_EXPERTS, "--moe-per-layer-logging"], {"moe_per_layer_logging": True}),
    ([*_EXPERTS, "--use-moe-pad-mask"], {"use_moe_pad_mask": True}),
    ([*_EXPERTS, "--use-moe-pad-mask", "false"], {"use_moe_pad_mask": False, "masks_padding": False}),
    (_EXPERTS, {"use_moe_pad_mask": None, "masks_padding": True}),
    (["--moe-freq", "2", "--moe-expert-count", "4"], {"use_moe_pad_mask": None, "masks_padding": False}),
    (["--moe-freq", "2", "--moe-expert-count", "4", "--use-moe-pad-mask", "true"], {"masks_padding": True}),
    ([*_EXPERTS, "--moe-ffn-hidden-size", "24"], {"expert_dim": 24}),
    ([*_EXPERTS, "--expert-model-parallel-size", "1"], {"megatron.expert_model_parallel_size": 1}),
    ([*_EXPERTS, "--expert-tensor-parallel-size", "2"], {"megatron.expert_tensor_parallel_size": 2}),
    ([*_EXPERTS, *_T2, "--expert-model-parallel-size", "4"], {"axes": (4, 2, 2, 1, 1)}),
    ([*_EXPERTS, *_T2, "--expert-tensor-parallel-size", "1"], {"axes": (None, 1, 2, 1, 1)}),
    ([*_EXPERTS, *_T2, "--moe-extended-tp", "--expert-model-parallel-size", "2"], {"axes": (1, 4, 2, 1, 1)}),
    ([*_EXPERTS, *_T2, "--moe-extended-ep", "--expert-model-parallel-size", "2"], {"axes": (4, 1, 2, 1, 1)}),
    (
        [*_EXPERTS, "--context-parallel-size", "2", "--cp-comm-type", "all_gather"],
        {"axes": (None, 1, 1, 2, 1)},
    ),
    ([*_EXPERTS, "--moe-input-jitter-eps", "0.01"], {"megatron.moe_input_jitter_eps": 0.01}),
    (
        [*_EXPERTS, "--moe-shared-expert-intermediate-size", "32", "--moe-shared-expert-gate"],
        {"megatron.moe_shared_expert_intermediate_size": 32, "megatron.moe_shared_expert_gate": True},
    ),
]

_HYDRA: list[tuple[list[str], dict[str, Any]]] = [
    (["model.moe_aux_loss_coeff=0.01"], {"loss_coefficients": {"aux": 0.01}}),
    (["model.moe_layer_freq=2"], {"megatron.moe_layer_freq": "2"}),
    (["model.moe_layer_freq='[0,1,1,1]'"], {"megatron.moe_layer_freq": "[0,1,1,1]"}),
    (
        [
            "model.moe_router_load_balancing_type='aux_loss seq_aux_loss'",
            "model.moe_aux_loss_coeff='0.1 0.2'",
        ],
        {"loss_coefficients": {"aux": 0.1, "seq_aux": 0.2}},
    ),
    (
        [
            "model.moe_expert_capacity_factor=1",
            "model.moe_pad_expert_input_to_capacity=true",
            "dataset.batch_size=5",
        ],
        {"megatron.moe_expert_capacity_factor": 1.0, "max_tokens": 5 * 1025},
    ),
    (["model.moe_expert_capacity_factor=1"], {"max_tokens": None}),
    (
        [
            "model.tensor_model_parallel_size=2",
            "model.sequence_parallel=true",
            "model.context_parallel_size=4",
        ],
        {"axes": (None, 2, 2, 4, 1), "parallel.sequence_parallel": True},
    ),
    (["model.use_moe_pad_mask=false"], {"use_moe_pad_mask": False}),
    (["model.use_moe_pad_mask=true"], {"use_moe_pad_mask": True}),
    (["model.use_moe_pad_mask=null"], {"use_moe_pad_mask": None, "masks_padding": True}),
]


def _values(model: Any, paths: Any) -> dict[str, Any]:
    moe = MoEConfig.from_args(model)
    found: dict[str, Any] = {}
    for path in paths:
        value: Any = moe
        if path == "max_tokens":
            path_in_rule, value = "capacity.max_tokens", moe.router_config()
        else:
            path_in_rule = path
        for name in path_in_rule.split("."):
            value = getattr(value, name)
        found[path] = value
    return found


def _parse(rank: int, lines: list[tuple[list[str], dict[str, Any]]]) -> list[dict[str, Any]]:
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    found = []
    for argv, expected in lines:
        sys.argv = ["fairseq-train", *_ARGV, *argv]
        args = options.parse_args_and_arch(options.get_training_parser())
        # Decoders are built from either: a namespace in older checkpoints, a configuration in newer ones.
        cfg = convert_namespace_to_omegaconf(args)
        values = _values(cfg.model, expected)
        assert _values(args, expected) == values
        found.append(values)
    return found


def _compose(rank: int, lines: list[tuple[list[str], dict[str, Any]]]) -> list[dict[str, Any]]:
    from pathlib import Path

    import fairseq
    import hydra
    from fairseq.dataclass.initialize import hydra_init
    from fairseq.utils import import_user_module
    from omegaconf import OmegaConf

    hydra_init()
    import_user_module(type("Common", (), {"user_dir": str(USER_DIR)})())
    base = ["task=language_modeling", "task.data=data", "model=transformer_lm", "model.num_experts=8"]
    found = []
    with hydra.initialize_config_dir(str(Path(fairseq.__file__).parent / "config")):
        for overrides, expected in lines:
            cfg = hydra.compose("config", overrides=[*base, "model.decoder_layers=4", *overrides])
            resolved = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
            found.append(_values(resolved.model, expected))
    return found


def test_command_lines() -> None:
    (found,) = run_ranks(_parse, 1, _COMMAND_LINES, timeout=100)
    assert found == [expected for _, expected in _COMMAND_LINES]


def test_hydra_overrides() -> None:
    (found,) = run_ranks(_compose, 1, _HYDRA, timeout=100)
    assert found == [expected for _, expected in _HYDRA]


def _parse_badly(rank: int, argv: list[str]) -> int:
    from fairseq import options

    sys.argv = ["fairseq-train", *_ARGV[1:], *argv]
    try:
        options.parse_args_and_arch(options.get_training_parser())
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_data_after_a_list_is_not_taken_for_one_of_its_values(capfd: pytest.CaptureFixture[str]) -> None:
    argv = [*_EXPERTS, "--moe-router-load-balancing-type", "aux_loss", "data"]
    assert run_ranks(_parse_badly, 1, argv) == [2]
    assert run_ranks(_parse_badly, 1, [*argv[:-1], "--moe-layer-freq", "1", "data"]) == [0]
    assert run_ranks(_parse_badly, 1, [*_EXPERTS, "--use-moe-pad-mask", "data"]) == [2]
    assert run_ranks(_parse_badly, 1, ["data", *_EXPERTS, "--use-moe-pad-mask"]) == [0]


# --- the table of other arguments ---


def _value(row: Any) -> Any:
    return {bool: True, int: 2, float: 1.5, str: "deepep"}[row.kind]


@pytest.mark.parametrize("row", MEGATRON_ARGS, ids=lambda row: row.flag)
def test_argument_of_the_table(row: Any) -> None:
    args = {"num_experts": 8, "moe_aux_loss_coeff": "0.01", row.name: _value(row)}
    problems, warnings = argument_problems(args), argument_warnings(args)
    if row.does == "refused":
        assert problems == [f"{row.flag} ({_value(row)}) cannot be honoured: {row.text}."]
        assert warnings == []
    else:
        assert problems == []
        (warning,) = warnings
        assert warning.startswith(row.flag)
        assert warning.endswith(".")


def test_the_routing_guide_names_every_argument() -> None:
    text = (REPOSITORY / "docs" / "routing.md").read_text()
    missing = [
        field.name for field in fields(MegatronConfig) if f"`--{field.name.replace('_', '-')}`" not in text
    ]
    assert missing == []


def test_every_argument_of_the_guides_is_known() -> None:
    known = {row.name for row in MEGATRON_ARGS} | {field.name for field in fields(MegatronConfig)}
    known |= {
        field.name for record in (MoEConfig, ParallelConfig, ShardingConfig) for field in fields(record)
    }
    guides = """
        num_experts expert_model_parallel_size moe_grouped_gemm moe_router_load_balancing_type
        moe_router_topk moe_aux_loss_coeff moe_z_loss_coeff moe_input_jitter_eps moe_token_dropping
        moe_token_dispatcher_type moe_per_layer_logging moe_expert_capacity_factor
        moe_pad_expert_input_to_capacity moe_token_drop_policy moe_layer_recompute moe_extended_tp
        moe_token_capacity_factor use_distributed_optimizer sequence_parallel overlap_grad_reduce
        overlap_param_gather tp_comm_overlap tensor_model_parallel_size pipeline_model_parallel_size
        num_layers_per_virtual_pipeline_stage use_dist_ckpt auto_detect_ckpt_format
        use_torch_fsdp2 context_parallel_size moe_extended_ep
    """
    assert set(guides.split()) <= known


@pytest.mark.parametrize(
    ("given", "warning"),
    [
        ({}, "nothing balances the experts: --moe-aux-loss-coeff is 0"),
        ({"moe_router_load_balancing_type": "seq_aux_loss"}, "nothing balances the experts"),
        (
            {"moe_router_load_balancing_type": "expert_choice"},
            "expert_choice is not causal: an expert chooses among all tokens of a batch",
        ),
        (
            {
                "moe_aux_loss_coeff": "0.1",
                "moe_router_pre_softmax": True,
                "moe_router_score_function": "sigmoid",
            },
            "--moe-router-pre-softmax does nothing with --moe-router-score-function sigmoid",
        ),
        (
            {"moe_aux_loss_coeff": "0.1", "moe_token_dispatcher_type": "alltoall_seq"},
            "--moe-token-dispatcher-type alltoall_seq stands for alltoall here; use that.",
        ),
        (
            {"moe_aux_loss_coeff": "0.1", "moe_enable_deepep": True},
            "--moe-enable-deepep is accepted and does nothing: the exchange is that of",
        ),
    ],
)
def test_surprises_are_announced(given: dict[str, Any], warning: str) -> None:
    (found,) = argument_warnings({"num_experts": 8, **given})
    assert found.startswith(warning)


@pytest.mark.parametrize(
    "given",
    [
        {"moe_aux_loss_coeff": "0.1"},
        {"moe_router_load_balancing_type": "none"},
        {"moe_router_load_balancing_type": "sinkhorn"},
        {"moe_router_load_balancing_type": "quantile_balancing"},
        {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
        {"moe_router_force_load_balancing": "random"},
        {"num_experts": None},
    ],
)
def test_no_warning_without_reason(given: dict[str, Any]) -> None:
    assert argument_warnings({"num_experts": 8, **given}) == []
