"""Every reason to refuse a combination of Megatron-Core's MoE arguments: one sentence each, all at once."""

import math
from collections.abc import Iterable

from fairseq_moe.flags.megatron import (
    DISPATCHERS,
    FORCED_CHOICES,
    LOAD_BALANCING_TYPES,
    MegatronConfig,
    moe_layer_pattern,
)
from fairseq_moe.flags.records import NOT_NEGATIVE, Range, changed_fields, flag_name, one_of, ranges, words
from fairseq_moe.modules.routing.capacity import DropPolicy
from fairseq_moe.modules.routing.scores import GroupScore, ScoreFunction
from fairseq_moe.modules.routing.topk import Choice

__all__ = ["megatron_problems", "unused_arguments"]

# These go with the moe branch's gates too.
_COMMON = {
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "moe_token_dispatcher_type",
    "moe_input_jitter_eps",
    "moe_router_dtype",
    "use_xmoe",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
}


def megatron_problems(config: MegatronConfig, *, num_layers: int) -> list[str]:
    """List one sentence per argument that cannot be honoured.

    Args:
        config: the arguments.
        num_layers: decoder layers.
    """
    found = ranges(config, _RANGES) + _common_problems(config)
    if not config.selected:
        stray = [flag_name(name) for name in changed_fields(config) if name not in _COMMON]
        if stray:
            found.append(
                f"{', '.join(stray)} describe Megatron's routing, which --num-experts N selects; give "
                "--num-experts in place of --moe-freq and --moe-expert-count."
            )
        return found
    if config.num_experts is not None and config.num_experts < 1:
        return found  # the range says so
    for problems in (
        _layer_problems(config, num_layers),
        _choice_problems(config),
        _bias_problems(config),
        _group_problems(config),
        _loss_problems(config),
        _capacity_problems(config),
        _expert_choice_problems(config),
        _sinkhorn_problems(config),
    ):
        found += problems
    return found


def unused_arguments(config: MegatronConfig) -> list[str]:
    """Refuse, in one sentence, arguments about experts that are given for a model without any."""
    flags = [flag_name(name) for name in changed_fields(config) if name in _COMMON]
    if not flags:
        return []
    return [
        f"{', '.join(flags)} concern experts, and no layer has any; give --num-experts N, or --moe-freq and "
        "--moe-expert-count."
    ]


def _positive(value: float) -> bool:
    return 0 < value < math.inf


_RANGES: dict[str, Range] = {
    "num_experts": (_positive, "at least 1"),
    "moe_ffn_hidden_size": (_positive, "a positive width"),
    "moe_shared_expert_intermediate_size": (_positive, "a positive width"),
    "moe_input_jitter_eps": (lambda eps: 0 <= eps < 1, "0 <= eps < 1"),
    "moe_z_loss_coeff": (lambda weight: 0 <= weight < math.inf, "a finite weight of at least 0"),
    "moe_router_topk_scaling_factor": (_positive, "a positive finite number"),
    "moe_router_bias_update_rate": (_positive, "a positive finite number"),
    "moe_expert_capacity_factor": (
        lambda factor: factor != 0 and math.isfinite(factor),
        "a positive number, or a negative one for no limit",
    ),
    "moe_expert_capacity_minimum": NOT_NEGATIVE,
    "moe_expert_capacity_warmup_updates": NOT_NEGATIVE,
}


def _common_problems(config: MegatronConfig) -> list[str]:
    kind = config.moe_token_dispatcher_type
    found = one_of(config, {"moe_token_dispatcher_type": DISPATCHERS})
    if kind == "allgather" and config.moe_pad_expert_input_to_capacity:
        found.append(
            "--moe-pad-expert-input-to-capacity fixes the shapes of an all-to-all; leave out "
            "--moe-token-dispatcher-type allgather."
        )
    found += one_of(config, {"moe_router_dtype": ("fp32", "fp64")})
    if config.moe_shared_expert_gate and config.moe_shared_expert_intermediate_size is None:
        found.append("--moe-shared-expert-gate needs --moe-shared-expert-intermediate-size; add it.")
    return found


def _layer_problems(config: MegatronConfig, num_layers: int) -> list[str]:
    try:
        pattern = moe_layer_pattern(config.moe_layer_freq or "1", num_layers)
    except ValueError as error:
        return [str(error)]
    if any(pattern):
        return []
    return [f"--moe-layer-freq {config.moe_layer_freq} gives no layer experts; mark at least one."]


def _choice_problems(config: MegatronConfig) -> list[str]:
    assert config.num_experts is not None
    found = []
    if not 1 <= config.top_k <= config.num_experts:
        found.append(
            f"--moe-router-topk is {config.top_k}, expected 1 to {config.num_experts} (--num-experts)."
        )
    found += one_of(config, {"moe_router_score_function": [kind.value for kind in ScoreFunction]})
    choices = {LOAD_BALANCING_TYPES.get(kind, (Choice.TOKEN,))[0] for kind in config.balancing_types}
    post_softmax = config.score_function == "softmax" and not config.moe_router_pre_softmax
    if config.top_k == 1 and post_softmax and choices == {Choice.TOKEN}:
        found.append(
            "--moe-router-topk 1 with a softmax over the one chosen expert gives it weight 1 and the "
            "router no gradient; add --moe-router-pre-softmax or another --moe-router-score-function."
        )
    forced = config.moe_router_force_load_balancing
    found += one_of(config, {"moe_router_force_load_balancing": FORCED_CHOICES})
    if forced is not None and choices != {Choice.TOKEN}:
        found.append(
            "--moe-router-force-load-balancing replaces the tokens' choice, which "
            f"--moe-router-load-balancing-type {' '.join(config.balancing_types)} replaces as well; choose "
            "one."
        )
    return found


def _bias_problems(config: MegatronConfig) -> list[str]:
    found = []
    if config.moe_router_bias and config.use_xmoe:
        found.append("--moe-router-bias is of a linear router, which --use-xmoe replaces; leave one out.")
    quantile = "quantile_balancing" in config.balancing_types
    if config.moe_router_enable_expert_bias:
        if quantile:
            found.append(
                "--moe-router-enable-expert-bias and quantile_balancing both set the bias; choose one."
            )
    elif config.moe_router_bias_update_rate is not None:
        found.append("--moe-router-bias-update-rate needs --moe-router-enable-expert-bias; add it.")
    if quantile and config.moe_router_num_groups is not None:
        found.append(
            "quantile_balancing compares all experts with one another, which --moe-router-num-groups does "
            "not allow; choose one."
        )
    return found


def _group_problems(config: MegatronConfig) -> list[str]:
    groups, kept = config.moe_router_num_groups, config.moe_router_group_topk
    score = config.moe_router_group_score or "sum"
    if groups is None and kept is None:
        if config.moe_router_group_score is not None:
            return [
                "--moe-router-group-score needs --moe-router-num-groups and --moe-router-group-topk; add "
                "them."
            ]
        return []
    if groups is None or kept is None:
        return ["--moe-router-num-groups and --moe-router-group-topk go together; give both."]
    assert config.num_experts is not None
    if groups < 1 or config.num_experts % groups:
        return [
            f"--moe-router-num-groups is {groups}, expected a divisor of the {config.num_experts} experts."
        ]
    if not 1 <= kept <= groups:
        return [f"--moe-router-group-topk is {kept}, expected 1 to {groups} (--moe-router-num-groups)."]
    found = one_of(config, {"moe_router_group_score": [kind.value for kind in GroupScore]})
    size = config.num_experts // groups
    if config.top_k > kept * size:
        found.append(
            f"--moe-router-topk {config.top_k} is more than the {kept * size} experts of {kept} groups; "
            "raise --moe-router-group-topk."
        )
    needed = {"sum": config.top_k // kept, "best_two": 2}.get(score, 1)
    if not 1 <= needed <= size:
        found.append(
            f"--moe-router-group-score {score} sums the best {needed} of a group's {size} experts, which is "
            "not possible; choose another group score, or other groups."
        )
    return found


def _loss_problems(config: MegatronConfig) -> list[str]:
    kinds = config.balancing_types
    listed = " ".join(kinds)
    unknown = [kind for kind in kinds if kind not in LOAD_BALANCING_TYPES]
    if unknown:
        return [
            f"--moe-router-load-balancing-type is {' '.join(unknown)}, expected one or several of "
            f"{', '.join(LOAD_BALANCING_TYPES)}."
        ]
    found = []
    if len(kinds) > 1 and not all(LOAD_BALANCING_TYPES[kind][1] for kind in kinds):
        found.append(
            f"--moe-router-load-balancing-type {listed}: only aux_loss, seq_aux_loss and global_aux_loss "
            "can be combined."
        )
    if len(set(kinds)) != len(kinds):
        found.append(f"--moe-router-load-balancing-type {listed} names a loss twice.")
    text = config.moe_aux_loss_coeff or "0"
    try:
        numbers = [float(word) for word in words(text)]
    except ValueError:
        return [*found, f"--moe-aux-loss-coeff is {text!r}, expected one or several numbers."]
    if len(numbers) not in (1, len(kinds)):
        found.append(
            f"--moe-aux-loss-coeff has {len(numbers)} numbers, expected 1 or {len(kinds)}, one per "
            "load-balancing type."
        )
    if any(not number >= 0 or math.isinf(number) for number in numbers):
        found.append(f"--moe-aux-loss-coeff is {text}, expected finite weights of at least 0.")
    if any(numbers) and not any(LOAD_BALANCING_TYPES[kind][1] for kind in kinds):
        found.append(
            f"--moe-aux-loss-coeff {text} has no loss to weigh with --moe-router-load-balancing-type "
            f"{listed}; set it to 0."
        )
    return found


def _capacity_problems(config: MegatronConfig) -> list[str]:
    found = []
    if not config.has_capacity:
        expert_choice = (
            "expert_choice" in config.balancing_types
        )  # experts have their places without a factor
        for flag, given in (
            ("--moe-pad-expert-input-to-capacity", config.moe_pad_expert_input_to_capacity),
            ("--moe-token-drop-policy", config.moe_token_drop_policy is not None),
            ("--moe-expert-capacity-warmup-updates", config.moe_expert_capacity_warmup_updates is not None),
            (
                "--moe-expert-capacity-minimum",
                config.moe_expert_capacity_minimum is not None and not expert_choice,
            ),
        ):
            if given:
                found.append(f"{flag} needs a positive --moe-expert-capacity-factor; add it.")
    found += one_of(config, {"moe_token_drop_policy": [policy.value for policy in DropPolicy]})
    if config.moe_pad_expert_input_to_capacity and config.moe_expert_capacity_warmup_updates is not None:
        found.append(
            "--moe-pad-expert-input-to-capacity fixes the shape of each expert's input, which "
            "--moe-expert-capacity-warmup-updates gives up; choose one."
        )
    return found


def _expert_choice_problems(config: MegatronConfig) -> list[str]:
    return _meaningless(
        config,
        "expert_choice",
        (
            "moe_router_pre_softmax", "moe_router_num_groups", "moe_router_enable_expert_bias",
            "moe_token_drop_policy", "moe_expert_capacity_warmup_updates",
        ),
        "lets experts choose by their probabilities and drops nobody",
    )  # fmt: skip


def _sinkhorn_problems(config: MegatronConfig) -> list[str]:
    return _meaningless(
        config,
        "sinkhorn",
        (
            "moe_router_score_function", "moe_router_pre_softmax", "moe_router_topk_scaling_factor",
            "moe_router_num_groups", "moe_router_enable_expert_bias", "moe_expert_capacity_factor",
        ),
        "has its own scores and balances by itself",
    )  # fmt: skip


def _meaningless(config: MegatronConfig, kind: str, names: Iterable[str], why: str) -> list[str]:
    if kind not in config.balancing_types:
        return []
    given = [flag_name(name) for name in changed_fields(config) if name in names]
    return [f"--moe-router-load-balancing-type {kind} {why}; leave out {', '.join(given)}."] if given else []
