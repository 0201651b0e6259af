"""Read and write the config.json of MiniMax-M2."""

from typing import Any

from fairseq_moe.convert.hf.config_keys import ConfigKeys
from fairseq_moe.convert.hf.families.common import ROUTED_ALONE, common_sizes, grouped_heads
from fairseq_moe.convert.hf.families.family import ExpertNames, Family
from fairseq_moe.convert.spec import ModelSpec, Routing

__all__ = ["MINIMAX_M2"]


def _read(keys: ConfigKeys) -> ModelSpec:
    common = common_sizes(keys, max_positions=196608)
    _fixed(keys, common["num_layers"])
    head_dim = keys.integer("head_dim")
    turned = keys.integer("rotary_dim", default=None)
    heads = grouped_heads(keys, common, fraction=1.0 if turned is None else turned / head_dim)
    if turned is not None and int(head_dim * heads["rope"].fraction) != turned and not keys.problems:
        keys.problems.append(
            f"{keys.source} has rotary_dim {turned} and head_dim {head_dim}, which contradict partial_rotary_factor "
            f"{heads['rope'].fraction}; correct one of them."
        )
    routing = Routing(
        num_experts=keys.integer("num_local_experts", "num_experts"),
        top_k=keys.integer("num_experts_per_tok"),
        score="sigmoid",
        normalized=True,
        expert_bias=True,
        aux_loss_coeff=keys.number("router_aux_loss_coef", 0.0),
    )
    return ModelSpec(
        **common,
        **heads,
        qk_norm="full",
        norm_eps=keys.number("rms_norm_eps", 1e-6, positive=True),
        expert_ffn_dim=keys.integer("intermediate_size"),
        moe_layers=(True,) * common["num_layers"],
        routing=routing,
    )


def _fixed(keys: ConfigKeys, num_layers: int) -> None:
    """Refuse what the published code of earlier models of this maker has and transformers' does not."""
    keys.fixed("attn_type_list", [1] * num_layers, why="every layer looks at all earlier tokens here")
    keys.fixed("attention_bias", False, why="projections of this family have no biases")
    keys.fixed("norm_topk_prob", True, why=ROUTED_ALONE)
    keys.fixed("qk_norm_type", "per_layer", why="queries and keys are normalised over all heads")
    keys.fixed("router_jitter_noise", 0, 0.0, why="experts here get what the router gets")
    keys.fixed("scoring_func", "sigmoid", why=ROUTED_ALONE)
    keys.fixed("shared_intermediate_size", 0, why="there is no shared expert in this family")
    keys.fixed("sliding_window", why="no layer of this family has a window")
    keys.fixed("use_qk_norm", True, why="transformers always normalises queries and keys")
    keys.fixed("use_routing_bias", True, why=ROUTED_ALONE)


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "attn_type_list": [1] * spec.num_layers,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.expert_ffn_dim,
        "num_local_experts": spec.routing.num_experts,
        "qk_norm_type": "per_layer",
        "rotary_dim": int(spec.head_dim * spec.rope.fraction),
        "router_aux_loss_coef": spec.routing.aux_loss_coeff,
        "scoring_func": "sigmoid",
        "use_qk_norm": True,
        "use_routing_bias": True,
    }


MINIMAX_M2 = Family(
    read=_read,
    write=_write,
    knows_parts=True,
    routes_in_float32=True,  # the published router weights are float32 beside FP8 experts
    published=ExpertNames(
        network="block_sparse_moe.", expert_bias="e_score_correction_bias", gate="w1", up="w3", down="w2"
    ),
    num_experts_key="num_local_experts",
)
