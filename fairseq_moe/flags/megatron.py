"""Declare Megatron-Core's MoE arguments as flags under their own names, and say what they mean here.

``--num-experts N`` selects Megatron's routing with Megatron's defaults, except that the expert-parallel size
is min(ranks, experts) and the dispatcher is alltoall unless said otherwise. Without it the moe branch's gates
are used, and the arguments that describe Megatron's routing are refused (``megatron_checks``).
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from fairseq_moe.flags.layer_pattern import layer_pattern
from fairseq_moe.flags.megatron_aliases import resolve_aliases
from fairseq_moe.flags.records import Group, flag, given_fields, words
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


_experts = functools.partial(flag, Group.EXPERTS)
_routing = functools.partial(flag, Group.ROUTING)


@dataclass(frozen=True, kw_only=True)
class MegatronConfig:
    """Hold the arguments; None means that one was not given."""

    num_experts: int | None = _experts(None, "experts per MoE layer, routed as in Megatron-Core")
    expert_model_parallel_size: int | None = _experts(
        None,
        "ranks over which the experts are spread (default: as many of a pipeline stage's ranks as there can be)",
    )
    expert_tensor_parallel_size: int | None = _experts(
        None,
        "ranks over which the width of each expert is divided (default: --tensor-model-parallel-size with "
        "--num-experts, else 1)",
    )
    moe_layer_freq: str | None = _experts(
        None, "N: layers 0, N, 2N, ... have experts; or a pattern such as ([0]+[1]*23) (default: 1)"
    )
    moe_ffn_hidden_size: int | None = _experts(
        None, "hidden width of an expert (default: --decoder-ffn-embed-dim)"
    )
    moe_router_topk: int | None = _routing(None, "experts per token (default: 2)")
    moe_router_load_balancing_type: str | None = _routing(
        None,
        "aux_loss (default), seq_aux_loss, global_aux_loss, several of these, quantile_balancing, sinkhorn, "
        "expert_choice or none",
    )
    moe_aux_loss_coeff: str | None = _routing(
        None, "weight of each balancing loss (default: 0; 1e-2 is a good start)"
    )
    moe_z_loss_coeff: float | None = _routing(
        None, "weight of the z-loss on router logits (1e-3 is a good start)"
    )
    moe_router_score_function: str | None = _routing(None, "softmax (default), sigmoid or sqrtsoftplus")
    moe_router_pre_softmax: bool = _routing(
        False, "softmax over all experts before the choice; weights are not renormalised"
    )
    moe_router_topk_scaling_factor: float | None = _routing(None, "multiplies the weights")
    moe_router_num_groups: int | None = _routing(
        None, "groups of neighbouring experts for group-limited routing"
    )
    moe_router_group_topk: int | None = _routing(None, "groups from which a token may choose")
    moe_router_group_score: str | None = _routing(
        None, "score of a group: sum of its best floor(topk / group topk) (default), best_two or max"
    )
    moe_router_enable_expert_bias: bool = _routing(False, "balance by a bias on the choice instead of a loss")
    moe_router_bias_update_rate: float | None = _routing(
        None, "step of the expert bias per update (default: 1e-3)"
    )
    moe_router_bias: bool = _routing(
        False, "router logits have a learned bias, which weights and losses see (gpt-oss)"
    )
    moe_router_force_load_balancing: str | None = _routing(
        None,
        "for benchmarks: random (the default), round_robin or hash (of the token's id) choice",
        argparse_const="random",
    )
    moe_expert_capacity_factor: float | None = _routing(
        None, "an expert takes ceil(tokens * topk / experts * factor) rows (default: no limit)"
    )
    moe_expert_capacity_minimum: int | None = _routing(None, "smallest capacity")
    moe_expert_capacity_warmup_updates: int | None = _routing(
        None, "the capacity holds for so many updates, then nothing is dropped"
    )
    moe_pad_expert_input_to_capacity: bool = _routing(
        False, "each expert gets exactly its capacity in rows: static shapes"
    )
    moe_token_drop_policy: str | None = _routing(
        None, "who is dropped: probs (default), position or prioritized"
    )
    # These go with the branch's gates too:
    moe_token_dispatcher_type: str | None = _experts(None, "alltoall (default) or allgather")
    moe_input_jitter_eps: float | None = _routing(
        None, "while training the router's input is multiplied by uniform(1-eps, 1+eps)"
    )
    moe_router_dtype: str | None = _routing(
        None, "precision of router logits: fp32 or fp64 (default: that of the model)"
    )
    use_xmoe: bool = _routing(False, "X-MoE's cosine router")
    moe_shared_expert_intermediate_size: int | None = _experts(
        None, "width of a network that every token passes besides its experts"
    )
    moe_shared_expert_gate: bool = _experts(
        False, "scale the shared network's output by a learned sigmoid gate"
    )

    @classmethod
    def from_args(cls, args: Any) -> "MegatronConfig":
        """Read the fields that ``args`` (a namespace, config or mapping) has."""
        return cls(**resolve_aliases(given_fields(cls, args), args))

    @property
    def selected(self) -> bool:
        """Tell whether Megatron's routing is asked for."""
        return self.num_experts is not None

    @property
    def top_k(self) -> int:
        """Return K, the experts per token; Megatron's default is 2."""
        return 2 if self.moe_router_topk is None else self.moe_router_topk

    @property
    def balancing_types(self) -> list[str]:
        """List the load-balancing types; Megatron's default is aux_loss (with coefficient 0)."""
        return words(self.moe_router_load_balancing_type or "aux_loss")

    @property
    def score_function(self) -> str:
        """Name the function that turns logits into scores; Megatron's default is softmax."""
        return self.moe_router_score_function or "softmax"

    @property
    def has_capacity(self) -> bool:
        """Tell whether experts have a capacity; a negative factor means no limit, as in Megatron."""
        return self.moe_expert_capacity_factor is not None and self.moe_expert_capacity_factor > 0

    def loss_coefficients(self) -> dict[str, float]:
        """Read the coefficients of auxiliary losses that are not 0, by name in ``modules.routing.contract.LOSSES``."""
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
        """Make the routing rule that these arguments ask for.

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
                by_probability=self.moe_router_enable_expert_bias,
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
        """Describe how router logits are computed."""
        dtypes = {None: None, "fp32": torch.float32, "fp64": torch.float64}
        return ScorerConfig(
            cosine=self.use_xmoe,
            dtype=dtypes[self.moe_router_dtype],
            jitter_eps=self.moe_input_jitter_eps,
            bias=self.moe_router_bias,
        )

    def bias_config(self) -> BiasConfig | None:
        """Describe how the expert bias follows the load; None: there is none."""
        rule = self._bias_rule()
        rate = 1e-3 if self.moe_router_bias_update_rate is None else self.moe_router_bias_update_rate
        return None if rule is None else BiasConfig(rule=rule, update_rate=rate)

    @property
    def dispatcher(self) -> str:
        """Name the dispatcher: alltoall (default), allgather, or padded."""
        if self.moe_pad_expert_input_to_capacity:
            return "padded"
        return self.moe_token_dispatcher_type or "alltoall"


def moe_layer_pattern(text: str, num_layers: int) -> list[bool]:
    """Mark the layers that have experts; see ``layer_pattern``."""
    return layer_pattern(text, num_layers, "moe_layer_freq")
