"""Which further keys of a config.json change nothing: a reviewed table, each entry with its reason.

A key that no family reads and that is not in here is refused, because a model that is read without it may be another
model. What tools leave behind is here as a kind, by a pattern, not name by name.
"""

import re
from dataclasses import dataclass
from typing import Any

__all__ = ["HARMLESS_KEYS", "HarmlessKey", "is_common", "is_harmless"]

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
        return (
            (not self.families or family in self.families)
            and re.fullmatch(self.pattern, key) is not None
            and any(
                allowed is _ANY or (type(allowed) is type(value) and allowed == value)
                for allowed in self.values
            )
        )


def _harmless(
    pattern: str, why: str, *families: str, values: tuple[Any, ...] = (_ANY,), common: bool = False
) -> HarmlessKey:
    return HarmlessKey(pattern=pattern, why=why, families=families, values=values, common=common)


HARMLESS_KEYS = (
    _harmless(
        r"_\w+",
        "notes of a library to itself: where a model came from, which implementation computes it",
        common=True,
    ),
    _harmless(
        r"architectures|auto_map|custom_pipelines|tokenizer_class", "which class reads the files", common=True
    ),
    _harmless(
        r"(torch_)?dtype|\w*_version|transformers_weights", "how and by what the files were written", common=True
    ),
    _harmless(r"(unsloth|axolotl|llama_?factory|mergekit|trl|peft)_\w+", "notes of training and merging tools"),
    _harmless(r"model_creator|quantized_by|base_model\w*|license\w*", "notes of whoever published the files"),
    _harmless(
        r"(attn|experts|moe|kernel)_implementation|use_flash_attn|use_flash_attention(_2)?|use_kernels?",
        "which of several implementations of the same function",
    ),
    _harmless(
        r"use_cache|output_\w+|return_dict\w*|gradient_checkpointing|torchscript|is_decoder|is_encoder_decoder|"
        r"use_bfloat16|tf_legacy_loss",
        "how a call runs or what it returns besides logits",
        common=True,
    ),
    _harmless(
        r"chunk_size_feed_forward|id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params|"
        r"keys_to_ignore_at_inference",
        "of heads other than that of a language model",
    ),
    _harmless(
        r"(bos|eos|pad|sep|cls|mask|unk|decoder_start|forced_bos|forced_eos)_token_id|prefix",
        "tokens: the dictionary and the tokenizer know them",
        common=True,
    ),
    _harmless(
        r"do_sample|num_beams|num_beam_groups|top_k|top_p|typical_p|temperature|\w+_penalty|min_length|max_length|"
        r"max_new_tokens|num_return_sequences|early_stopping|\w*no_repeat_ngram_size|bad_words_ids|\w*suppress_tokens|"
        r"remove_invalid_values|exponential_decay_length_penalty",
        "settings of generation, which transformers 4 wrote into config.json",
    ),
    _harmless(r"pretraining_tp|ep_size|tp_size|pp_size|num_gpus", "how the model was spread over devices", common=True),
    _harmless(
        r"add_cross_attention|tie_encoder_decoder|use_mrope|mlp_bias",
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
        r"max_window_layers", "layers with a sliding window, which is off", "qwen2_moe", "qwen3_moe", common=True
    ),
    _harmless(
        r"qkv_bias", "Qwen3 has no such bias; attention_bias says whether there are any", "qwen3_moe", values=(False,)
    ),
    _harmless(
        r"shared_expert_intermediate_size", "Qwen3-MoE has no shared expert", "qwen3_moe", values=(0,)
    ),
    _harmless(r"use_qk_norm|qk_norm", "Qwen3 and OLMoE always normalise", "qwen3_moe", "olmoe", values=(True,)),
    _harmless(
        r"num_nextn_predict_layers|num_mtp_layers", "no prediction blocks", "mixtral", "qwen2_moe", "qwen3_moe",
        "olmoe", "deepseek_v2", values=(0,),
    ),
)  # fmt: skip


def is_harmless(family: str, key: str, value: Any) -> bool:
    """Tell whether the table covers a key of a family's config.json."""
    return any(entry.covers(family, key, value) for entry in HARMLESS_KEYS)


def is_common(family: str, key: str, value: Any) -> bool:
    """Tell whether so many files have a key that naming it would tell nobody anything."""
    return any(entry.common and entry.covers(family, key, value) for entry in HARMLESS_KEYS)
