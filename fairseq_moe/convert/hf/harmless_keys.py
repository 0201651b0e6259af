"""List further keys of a config.json that change nothing: a reviewed table, each entry with its reason.

A key that no family reads and that is not in here is refused, because a model that is read without it may be another
model. What tools leave behind is here as a kind, by a pattern, not name by name.
"""

import re
from dataclasses import dataclass
from typing import Any

__all__ = ["HARMLESS_KEYS", "HarmlessKey", "expectation", "is_common", "is_harmless"]

_ANY: Any = object()


@dataclass(frozen=True, kw_only=True)
class HarmlessKey:
    """Record keys that may be carried along unread.

    Args:
        pattern: of the whole key.
        why: reason that they change nothing.
        families: in these alone; empty: in all.
        values: only with one of these values; none given: with any.
        common: so many files have them that no note names them.
    """

    pattern: str
    why: str
    families: tuple[str, ...] = ()
    values: tuple[Any, ...] = (_ANY,)
    common: bool = False

    def covers(self, family: str, key: str, value: Any) -> bool:
        """Tell whether a key of a family's config.json is one of these."""
        return self.names(family, key) and any(
            allowed is _ANY or (type(allowed) is type(value) and allowed == value) for allowed in self.values
        )

    def names(self, family: str, key: str) -> bool:
        """Tell whether a key of a family's config.json is one of these, if its value is too."""
        return (not self.families or family in self.families) and bool(re.fullmatch(self.pattern, key))


def _harmless(
    pattern: str, why: str, *families: str, values: tuple[Any, ...] = (_ANY,), common: bool = False
) -> HarmlessKey:
    return HarmlessKey(pattern=pattern, why=why, families=families, values=values, common=common)


_OTHERS_THAN_DEEPSEEK = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
_LIKE_DEEPSEEK_V3 = ("deepseek_v3", "kimi_k2", "glm4_moe", "glm4_moe_lite", "dots1")

_OF_ERNIE_AND_HUNYUAN = (
    _harmless(
        r"moe_capacity|moe_use_hard_gate|global_aux_loss|moe_group_orthogonal_loss|(moe_\w+_loss|multi_token_pred)_lambda",
        "of training, where transformers drops no token and adds no such loss", "ernie4_5_moe",
    ),
    _harmless(
        r"num_nextn_predict_layers", "prediction blocks, which transformers does not read", "ernie4_5_moe",
    ),
    _harmless(r"moe_gate", "which code chooses the best", "ernie4_5_moe", values=("topk", "topk_fused")),
    _harmless(r"moe_gate_act", "the only one of this family", "ernie4_5_moe", values=("softmax",)),
    _harmless(
        r"moe_use_aux_free|use_rmsnorm", "routers have their bias, norms are RMSNorm", "ernie4_5_moe", values=(True,)
    ),
    _harmless(r"compression_ratio", "positions as they are", "ernie4_5_moe", values=(1, 1.0)),
    _harmless(r"attention_probs_dropout_prob", "no dropout", "ernie4_5_moe", values=(0, 0.0)),
    _harmless(
        r"fuse_\w+|use_fast_ln|max_sequence_length|paddlenlp_version", "how PaddlePaddle computes", "ernie4_5_moe"
    ),
    _harmless(
        r"(eod|(im|text|video)_(start|end)|im_newline|image|mask_init)(_token)?_id|pad_id|org_vocab_size",
        "the tokenizer knows these tokens", "hunyuan_v1_moe", common=True,
    ),
    _harmless(
        r"dense_list|class_num|pool_type|(anyres|vit)_\w+|num_media_embeds|skip_cls_token",
        "of classifiers and of images, which this class does not have", "hunyuan_v1_moe",
    ),
    _harmless(r"cla_share_factor", "layers share nothing: use_cla says so", "hunyuan_v1_moe"),
    _harmless(
        r"add_classification_head|position_embedding_xdrope|use_mla|group_limited_greedy|n_group|topk_group|"
        r"routed_scaling_factor|moe_drop_tokens|moe_random_routing_dropped_token",
        "a part that this model does not have", "hunyuan_v1_moe",
        values=(False,),
    ),
    _harmless(r"moe_layer_num_skipped", "experts in every layer", "hunyuan_v1_moe", values=(0,)),
    _harmless(r"norm_topk_prob|use_rotary_pos_emb", "always so", "hunyuan_v1_moe", values=(True,)),
    _harmless(r"norm_type", "two names of RMSNorm", "hunyuan_v1_moe", values=("rms", "hf_rms")),
    _harmless(r"attention_bias", "no bias that this key switches", "ernie4_5_moe", values=(False,)),
)  # fmt: skip

HARMLESS_KEYS = (
    *_OF_ERNIE_AND_HUNYUAN,
    # What transformers writes into the files of all families.
    _harmless(
        r"_?name_or_path|_commit_hash|_from_auto|_from_pipeline|_auto_class|_(attn|experts)_implementation\w*|"
        r"_output_attentions|_pre_quantization_dtype|_flash_attn_2_enabled",
        "notes of transformers to itself: where a model came from, which implementation computes it",
        common=True,
    ),
    _harmless(
        r"architectures|auto_map|custom_pipelines|tokenizer_class", "which class reads the files", common=True
    ),
    _harmless(
        r"(torch_)?dtype|transformers_version",
        "how and by what the files were written",
        common=True,
    ),
    _harmless(
        r"use_cache|output_(attentions|hidden_states|router_logits|past)|return_dict|gradient_checkpointing|torchscript|"
        r"is_decoder|is_encoder_decoder|use_bfloat16|tf_legacy_loss|tie_last_hidden_states",
        "how a call runs, or what it returns besides logits",
        common=True,
    ),
    _harmless(
        r"(bos|eos|pad|sep|cls|mask|unk)_token(_id)?|prefix",
        "the dictionary and the tokenizer know these tokens",
        common=True,
    ),
    _harmless(
        r"chunk_size_feed_forward|id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params|"
        r"classifier_dropout|keys_to_ignore_at_inference",
        "of heads other than that of a language model",
    ),
    _harmless(
        r"do_sample|num_beams|num_beam_groups|top_k|top_p|top_h|min_p|typical_p|temperature|\w+_cutoff|penalty_alpha|"
        r"(repetition|encoder_repetition|length|diversity|exponential_decay_length)_penalty|(min|max)(_new)?_length|"
        r"(min|max)_new_tokens|max_time|stop_strings|num_return_sequences|early_stopping|(encoder_)?no_repeat_ngram_size|"
        r"max_matching_ngram_size|(bad|force)_words_ids|(begin_)?suppress_tokens|remove_invalid_values|low_memory|"
        r"(decoder_start|forced_bos|forced_eos)_token_id|output_(scores|logits)|return_dict_in_generate|guidance_scale|"
        r"renormalize_logits|sequence_bias|constraints|token_healing|use_mtp|dola_layers|speculation_type|"
        r"target_lookbehind|(is_)?assistant(_\w+)?|num_assistant_tokens(_schedule)?|prompt_lookup_num_tokens|"
        r"prefill_chunk_size|(cache|compile|watermarking|continuous_batching)_config|cache_implementation|max_cache_len|"
        r"disable_compile",
        "settings of generation, which transformers 4 wrote into config.json",
    ),
    _harmless(
        r"transformers_weights", "transformers loads the file of this name, which here must be the one that is read",
        values=("model.safetensors", "model.safetensors.index.json"),
    ),
    # What other tools and people leave behind.
    _harmless(
        r"(unsloth|axolotl|llama_?factory|mergekit|trl|swift)_\w+|_unsloth\w*|transformers\.js_config|vllm_\w+|\w*torch_version",
        "notes of tools that train, merge or serve",
    ),
    _harmless(
        r"model_creator|model_name|quantized_by|base_model(_name\w*)?|license(_\w+)?|language|tags",
        "notes of whoever published the files",
    ),
    _harmless(
        r"(attn|experts|moe|kernel)_implementation|use_flash_attn|use_flash_attention(_2)?|use_kernels?",
        "which of several implementations of the same function",
    ),
    _harmless(r"pretraining_tp|ep_size", "how the model was spread over devices when it was trained", common=True),
    _harmless(r"(tp|pp)_size|num_gpus|base_model_\w+_plan", "how the model is spread over devices"),
    _harmless(r"(tokenizer_)?model_max_length", "what the tokenizer cuts off"),
    _harmless(
        r"aux_loss_alpha|seq_aux|\w*z_loss(_\w+)?|router_aux_loss_coef",
        "weights of losses that transformers' code of the family does not add; training here has flags for them",
    ),
    _harmless(r"initial_context_length", "the rope settings say it", "gpt_oss", common=True),
    # Parts that a model of the family never has, or always has, said once more.
    _harmless(
        r"add_cross_attention|tie_encoder_decoder|use_mrope|mlp_bias|use_sliding_window",
        "a part that this model does not have",
        values=(False,),
    ),
    _harmless(r"pruned_heads", "nothing is pruned", values=({}, [])),
    _harmless(
        r"hidden_dropout(_prob)?|(embd|resid|embedding|residual)_p?drop(out)?|ffn_dropout|mlp_dropout",
        "no dropout",
        values=(0, 0.0),
    ),
    _harmless(
        r"max_window_layers", "transformers reads it for Qwen2 alone", "qwen3_moe", common=True
    ),
    _harmless(
        r"qkv_bias", "Qwen3 has no such bias; attention_bias says whether there are any", "qwen3_moe", values=(False,)
    ),
    _harmless(
        r"shared_expert_intermediate_size|n_shared_experts", "no shared expert", "mixtral", "qwen3_moe", "olmoe",
        values=(0,),
    ),
    _harmless(r"use_qk_norm|qk_norm", "Qwen3 and OLMoE always normalise", "qwen3_moe", "olmoe", values=(True,)),
    _harmless(r"use_qk_norm|qk_norm", "they never normalise", "mixtral", "qwen2_moe", values=(False,)),
    _harmless(r"norm_topk_prob", "Mixtral always divides weights by their sum", "mixtral", values=(True,)),
    _harmless(r"rope_interleave", "V2 always turns neighbours", "deepseek_v2", values=(True,)),
    _harmless(
        r"num_nextn_predict_layers|num_mtp_layers", "no prediction blocks", *_OTHERS_THAN_DEEPSEEK, "deepseek_v2",
        values=(0,),
    ),
    _harmless(r"first_k_dense_replace", "no dense layers in front", *_OTHERS_THAN_DEEPSEEK, values=(0,)),
    _harmless(r"moe_layer_freq|n_group|topk_group", "every layer, one group", *_OTHERS_THAN_DEEPSEEK, values=(1,)),
    _harmless(r"routed_scaling_factor", "weights as they are", *_OTHERS_THAN_DEEPSEEK, values=(1, 1.0)),
    _harmless(r"scoring_func", "the only one of these families", *_OTHERS_THAN_DEEPSEEK, values=("softmax",)),
    _harmless(r"attention_bias", "no bias that this key switches", "mixtral", "qwen2_moe", values=(False,)),
    _harmless(r"decoder_sparse_step", "experts in every layer", "mixtral", "olmoe", values=(1,)),
    _harmless(r"mlp_only_layers", "experts in every layer", "mixtral", "olmoe", values=([],)),
    _harmless(
        r"router_jitter_noise", "no noise", "olmoe", "qwen2_moe", "qwen3_moe", *_LIKE_DEEPSEEK_V3, "deepseek_v2",
        values=(0, 0.0),
    ),
    _harmless(r"moe_router_dtype", "its router always computes in it", *_LIKE_DEEPSEEK_V3, values=("float32", "fp32")),
    _harmless(r"decoder_sparse_step", "experts after the dense layers", *_LIKE_DEEPSEEK_V3, values=(1,)),
    _harmless(r"rope_interleave", "a pair is two halves", "glm4_moe", "dots1", "minimax_m2", values=(False,)),
    _harmless(r"use_qk_norm|qk_norm", "dots.llm1 always normalises", "dots1", values=(True,)),
    _harmless(r"num_nextn_predict_layers|num_mtp_layers", "no prediction blocks", "dots1", "minimax_m2", values=(0,)),
    _harmless(
        r"use_mtp|num_mtp_modules|mtp_transformer_layers", "prediction blocks, which no published files hold",
        "minimax_m2", common=True,
    ),
    _harmless(r"mlp_intermediate_size", "of dense layers, which MiniMax-M2 has none of", "minimax_m2"),
)  # fmt: skip


def is_harmless(family: str, key: str, value: Any) -> bool:
    """Tell whether the table covers a key of a family's config.json."""
    return any(entry.covers(family, key, value) for entry in HARMLESS_KEYS)


def is_common(family: str, key: str, value: Any) -> bool:
    """Tell whether so many files have a key that naming it would tell nobody anything."""
    return any(entry.common and entry.covers(family, key, value) for entry in HARMLESS_KEYS)


def expectation(family: str, key: str) -> str | None:
    """Say with which values a key of a family's config.json would be harmless, and why; None: with none."""
    for entry in HARMLESS_KEYS:
        if entry.names(family, key):
            return f"expected {' or '.join(map(repr, entry.values))} ({entry.why})"
    return None
