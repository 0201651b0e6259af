"""Megatron-Core's MoE arguments under their own names, and what they mean here.

``--num-experts N`` selects Megatron's routing with Megatron's defaults, except that the expert-parallel size
is min(ranks, experts) and the dispatcher is alltoall unless said otherwise. Without it the moe branch's gates
are used, and the arguments that describe Megatron's routing are refused (``megatron_checks``).
"""

import ast
from dataclasses import dataclass
from typing import Any

import torch

from fairseq_moe.flags.megatron_aliases import resolve_aliases
from fairseq_moe.flags.records import given_fields, words
from fairseq_moe.modules.routing.bias import BiasConfig, BiasRule
from fairseq_moe.modules.routing.capacity import DropPolicy
from fairseq_moe.modules.routing.router import ScorerConfig
from fairseq_moe.modules.routing.scores import GroupScore, ScoreFunction, ScoreRule
from fairseq_moe.modules.routing.topk import CapacityConfig, Choice, TopKConfig

__all__ = [
    "DISPATCHERS",
    "FORCED_CHOICES",
    "LOAD_BALANCING_TYPES",
    "MegatronConfig",
    "moe_layer_pattern",
]

# --moe-router-load-balancing-type -> (who chooses, auxiliary loss)
LOAD_BALANCING_TYPES: dict[str, tuple[Choice, str | None]] = {
    "aux_loss": (Choice.TOKEN, "aux"),
    "seq_aux_loss": (Choice.TOKEN, "seq_aux"),
    "global_aux_loss": (Choice.TOKEN, "global_aux"),
    "sinkhorn": (Choice.SINKHORN, None),
    "expert_choice": (Choice.EXPERT, None),
    "quantile_balancing": (Choice.TOKEN, None),
    "none": (Choice.TOKEN, None),
}
DISPATCHERS = ("alltoall", "allgather")
# --moe-router-force-load-balancing -> who chooses
FORCED_CHOICES = {"random": Choice.RANDOM, "round_robin": Choice.ROUND_ROBIN, "hash": Choice.HASH}

_MAX_PATTERN = 100_000  # layers


@dataclass(frozen=True, kw_only=True)
class MegatronConfig:
    """The arguments; None means that one was not given."""

    num_experts: int | None = None
    expert_model_parallel_size: int | None = None
    moe_layer_freq: str | None = None
    moe_ffn_hidden_size: int | None = None
    moe_router_topk: int | None = None
    moe_router_load_balancing_type: str | None = None
    moe_aux_loss_coeff: str | None = None
    moe_z_loss_coeff: float | None = None
    moe_router_score_function: str | None = None
    moe_router_pre_softmax: bool = False
    moe_router_topk_scaling_factor: float | None = None
    moe_router_num_groups: int | None = None
    moe_router_group_topk: int | None = None
    moe_router_group_score: str | None = None
    moe_router_enable_expert_bias: bool = False
    moe_router_bias_update_rate: float | None = None
    moe_router_force_load_balancing: str | None = None
    moe_expert_capacity_factor: float | None = None
    moe_expert_capacity_minimum: int | None = None
    moe_expert_capacity_warmup_updates: int | None = None
    moe_pad_expert_input_to_capacity: bool = False
    moe_token_drop_policy: str | None = None
    # These go with the branch's gates too:
    moe_token_dispatcher_type: str | None = None
    moe_input_jitter_eps: float | None = None
    moe_router_dtype: str | None = None
    use_xmoe: bool = False
    moe_shared_expert_intermediate_size: int | None = None
    moe_shared_expert_gate: bool = False

    @classmethod
    def from_args(cls, args: Any) -> "MegatronConfig":
        """Read the fields that ``args`` (a namespace, config or mapping) has."""
        return cls(**resolve_aliases(given_fields(cls, args), args))

    @property
    def selected(self) -> bool:
        """Whether Megatron's routing is asked for."""
        return self.num_experts is not None

    @property
    def top_k(self) -> int:
        """K; Megatron's default is 2."""
        return 2 if self.moe_router_topk is None else self.moe_router_topk

    @property
    def balancing_types(self) -> list[str]:
        """The load-balancing types, one or several; Megatron's default is aux_loss (with coefficient 0)."""
        return words(self.moe_router_load_balancing_type or "aux_loss")

    @property
    def score_function(self) -> str:
        """What a logit means; Megatron's default is softmax."""
        return self.moe_router_score_function or "softmax"

    @property
    def has_capacity(self) -> bool:
        """Whether experts take a limited number of rows; a negative factor means no limit, as in Megatron."""
        return self.moe_expert_capacity_factor is not None and self.moe_expert_capacity_factor > 0

    def loss_coefficients(self) -> dict[str, float]:
        """Coefficient of each auxiliary loss that is not 0, by its name in ``modules.routing.contract.LOSSES``."""
        numbers = [float(word) for word in words(self.moe_aux_loss_coeff or "0")]
        names = [LOAD_BALANCING_TYPES[kind][1] for kind in self.balancing_types]
        if len(numbers) == 1:
            numbers = numbers * len(names)
        found = {
            name: number
            for name, number in zip(names, numbers, strict=True)
            if name is not None and number != 0
        }
        if self.moe_z_loss_coeff:
            found["z"] = self.moe_z_loss_coeff
        return found

    def topk_config(self, *, max_tokens: int | None = None) -> TopKConfig:
        """The routing rule these arguments ask for.

        Args:
            max_tokens: tokens of the largest training batch of any rank, if it is known.
        """
        choice = LOAD_BALANCING_TYPES[self.balancing_types[0]][0]
        if self.moe_router_force_load_balancing is not None:
            choice = FORCED_CHOICES[self.moe_router_force_load_balancing]
        scaling = self.moe_router_topk_scaling_factor
        return TopKConfig(
            score=ScoreRule(
                top_k=self.top_k,
                function=ScoreFunction(self.score_function),
                pre_softmax=self.moe_router_pre_softmax,
                scaling_factor=1.0 if scaling is None else scaling,
                num_groups=self.moe_router_num_groups,
                group_topk=self.moe_router_group_topk,
                group_score=GroupScore(self.moe_router_group_score or "sum"),
            ),
            choice=choice,
            capacity=self._capacity(max_tokens),
            aux_losses=frozenset(self.loss_coefficients()),
        )

    def _bias_rule(self) -> BiasRule | None:
        if self.selected and "quantile_balancing" in self.balancing_types:
            return BiasRule.QUANTILE
        return BiasRule.SIGN if self.moe_router_enable_expert_bias else None

    def _capacity(self, max_tokens: int | None) -> CapacityConfig:
        return CapacityConfig(
            max_tokens=max_tokens,
            factor=self.moe_expert_capacity_factor if self.has_capacity else None,
            minimum=self.moe_expert_capacity_minimum or 0,
            policy=DropPolicy(self.moe_token_drop_policy or "probs"),
            num_warmup_updates=self.moe_expert_capacity_warmup_updates,
        )

    def scorer_config(self) -> ScorerConfig:
        """How logits are computed."""
        dtypes = {None: None, "fp32": torch.float32, "fp64": torch.float64}
        return ScorerConfig(
            cosine=self.use_xmoe,
            dtype=dtypes[self.moe_router_dtype],
            jitter_eps=self.moe_input_jitter_eps,
        )

    def bias_config(self) -> BiasConfig | None:
        """How the expert bias follows the load; None: there is none."""
        rule = self._bias_rule()
        rate = 1e-3 if self.moe_router_bias_update_rate is None else self.moe_router_bias_update_rate
        return None if rule is None else BiasConfig(rule=rule, update_rate=rate)

    @property
    def dispatcher(self) -> str:
        """alltoall (default), allgather, or padded."""
        if self.moe_pad_expert_input_to_capacity:
            return "padded"
        return self.moe_token_dispatcher_type or "alltoall"


def moe_layer_pattern(text: str, num_layers: int) -> list[bool]:
    """Which layers have experts.

    Args:
        text: N (layers 0, N, 2N, ...; Megatron's rule), or a list of 0 and 1 such as ``([0]+[1]*23)``.
        num_layers: decoder layers.

    Raises:
        ValueError: one sentence.
    """
    problem = (
        f"--moe-layer-freq is {text!r}, expected a number N or {num_layers} zeros and ones such as "
        f"([0]+[1]*{num_layers - 1})."
    )
    try:
        value = _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(problem) from error
    if isinstance(value, int) and value >= 1:
        return [index % value == 0 for index in range(num_layers)]
    if isinstance(value, list) and len(value) == num_layers and all(mark in (0, 1) for mark in value):
        return [bool(mark) for mark in value]
    raise ValueError(problem)


def _evaluate(node: ast.expr) -> Any:
    """Lists of integers, added and repeated: nothing else is evaluated, and no list grows beyond reason."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List):
        return [_evaluate(item) for item in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _evaluate(node.left) + _evaluate(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        left, right = _evaluate(node.left), _evaluate(node.right)
        sizes = [len(value) if isinstance(value, list) else value for value in (left, right)]
        if sizes[0] * sizes[1] <= _MAX_PATTERN:
            return left * right
    raise TypeError("not a list of integers")
