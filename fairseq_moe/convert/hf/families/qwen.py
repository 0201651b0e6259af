"""Read and write the config.json of Qwen1.5-MoE, Qwen2-MoE and Qwen3-MoE."""

from typing import Any

from fairseq_moe.convert.hf.config_keys import ConfigKeys
from fairseq_moe.convert.hf.families.common import common_sizes, grouped_heads
from fairseq_moe.convert.hf.families.family import ExpertNames, Family
from fairseq_moe.convert.hf.families.windows import layer_types, window_of, windows
from fairseq_moe.convert.spec import ModelSpec, Routing

__all__ = ["QWEN2_MOE", "QWEN3_MOE"]


def _qwen(keys: ConfigKeys, common: dict[str, Any], **own: Any) -> ModelSpec:
    routing = Routing(
        num_experts=keys.integer("num_experts", "num_local_experts"),
        top_k=keys.integer("num_experts_per_tok"),
        normalized=keys.flag("norm_topk_prob", False),
        aux_loss_coeff=keys.number("router_aux_loss_coef", 0.0),
    )
    step, dense = keys.integer("decoder_sparse_step", default=1), keys.integers("mlp_only_layers")
    moe_layers = tuple(
        index not in dense and (index + 1) % step == 0 for index in range(common["num_layers"])
    )
    dense_dim = keys.integer("intermediate_size")
    return ModelSpec(
        **common,
        **grouped_heads(keys, common),
        norm_eps=keys.number("rms_norm_eps", 1e-6, positive=True),
        dense_ffn_dim=None if all(moe_layers) else dense_dim,
        expert_ffn_dim=keys.integer("moe_intermediate_size"),
        moe_layers=moe_layers,
        routing=routing,
        **own,
    )


def _qwen2_moe(keys: ConfigKeys) -> ModelSpec:
    common = common_sizes(keys, max_positions=32768)
    return _qwen(
        keys,
        common,
        **_windows_of_qwen2(keys, common["num_layers"]),
        attention_bias="qkv" if keys.flag("qkv_bias", True) else "none",
        shared_ffn_dim=keys.integer("shared_expert_intermediate_size"),
        shared_gate=True,
    )


def _windows_of_qwen2(keys: ConfigKeys, num_layers: int) -> dict[str, Any]:
    # As transformers reads it: every second one of the first layers. In Qwen's own code it is the last layers.
    is_on, first = (
        keys.flag("use_sliding_window", False),
        keys.integer("max_window_layers", default=28, least=0),
    )
    default = [is_on and index % 2 == 0 and index < first for index in range(num_layers)]
    window = window_of(keys, absent=4096, is_on=is_on)
    return windows(keys, window, num_layers=num_layers, default=default)


def _qwen3_moe(keys: ConfigKeys) -> ModelSpec:
    common = common_sizes(keys, max_positions=32768)
    bias = keys.flag("attention_bias", False)
    window = window_of(keys, absent=4096, is_on=keys.flag("use_sliding_window", False))
    everywhere = (window is not None,) * common["num_layers"]
    found = windows(keys, window, num_layers=len(everywhere), default=everywhere)
    if not keys.problems and found.get("window_layers", ()) != (everywhere if window else ()):
        keys.problems.append(
            f"{keys.source} has layer_types that differ, expected all layers alike: of this family transformers reads "
            "use_sliding_window alone."
        )
    return _qwen(keys, common, **found, attention_bias="all" if bias else "none", qk_norm="head")


def _write(spec: ModelSpec, **own: Any) -> dict[str, Any]:
    return own | {
        "decoder_sparse_step": 1,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.dense_ffn_dim or spec.expert_ffn_dim,
        "mlp_only_layers": [index for index, is_moe in enumerate(spec.moe_layers) if not is_moe],
        "moe_intermediate_size": spec.expert_ffn_dim,
        "norm_topk_prob": spec.routing.normalized,
        "num_experts": spec.routing.num_experts,
        "router_aux_loss_coef": spec.routing.aux_loss_coeff,
        "sliding_window": spec.window,
        "use_sliding_window": spec.window is not None,
    }


def _write_qwen2(spec: ModelSpec) -> dict[str, Any]:
    return _write(
        spec,
        architectures=["Qwen2MoeForCausalLM"],
        qkv_bias=spec.attention_bias == "qkv",
        shared_expert_intermediate_size=spec.shared_ffn_dim,
        **({} if spec.window is None else {"layer_types": layer_types(spec)}),
    )


def _write_qwen3(spec: ModelSpec) -> dict[str, Any]:
    return _write(spec, architectures=["Qwen3MoeForCausalLM"], attention_bias=spec.attention_bias == "all")


QWEN2_MOE = Family(
    read=_qwen2_moe,
    write=_write_qwen2,
    published=ExpertNames(shared="shared_expert."),
    num_experts_key="num_experts",
)
QWEN3_MOE = Family(read=_qwen3_moe, write=_write_qwen3, num_experts_key="num_experts")
