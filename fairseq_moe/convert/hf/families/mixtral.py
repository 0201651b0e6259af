"""Read and write the config.json of Mixtral (Jiang et al. 2024, arXiv 2401.04088)."""

from typing import Any

from fairseq_moe.convert.hf.config_keys import ConfigKeys
from fairseq_moe.convert.hf.families.common import common_sizes, grouped_heads
from fairseq_moe.convert.hf.families.family import ExpertNames, Family
from fairseq_moe.convert.hf.families.windows import window_of
from fairseq_moe.convert.spec import ModelSpec, Routing

__all__ = ["MIXTRAL"]


def _read(keys: ConfigKeys) -> ModelSpec:
    common = common_sizes(keys, max_positions=131072)
    window, everywhere = window_of(keys), (True,) * common["num_layers"]
    keys.fixed("router_jitter_noise", 0, 0.0, why="experts here get what the router gets")
    routing = Routing(
        num_experts=keys.integer("num_local_experts", "num_experts"),
        top_k=keys.integer("num_experts_per_tok"),
        normalized=True,
        aux_loss_coeff=keys.number("router_aux_loss_coef", 0.0),
    )
    return ModelSpec(
        **common,
        **grouped_heads(keys, common, if_null=True),
        window=window,
        window_layers=() if window is None else everywhere,
        norm_eps=keys.number("rms_norm_eps", 1e-5, positive=True),
        expert_ffn_dim=keys.integer("intermediate_size"),
        moe_layers=everywhere,
        routing=routing,
    )


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "head_dim": spec.head_dim,
        "intermediate_size": spec.expert_ffn_dim,
        "num_local_experts": spec.routing.num_experts,
        "router_aux_loss_coef": spec.routing.aux_loss_coeff,
        "sliding_window": spec.window,
    }


MIXTRAL = Family(
    read=_read,
    write=_write,
    published=ExpertNames(network="block_sparse_moe.", gate="w1", up="w3", down="w2"),
    num_experts_key="num_local_experts",
)
