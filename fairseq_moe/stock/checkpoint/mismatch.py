"""The configuration in a checkpoint: why it does not fit a model, and flags that it does not know yet."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from omegaconf import open_dict
from torch import nn

from fairseq_moe.flags.moe import MoEConfig
from fairseq_moe.flags.parallel import ParallelConfig
from fairseq_moe.models.fitting import shape_problems
from fairseq_moe.stock.find_experts import any_flattened

__all__ = ["forget_layout", "model_problems", "override_new_flags"]

# Over which ranks a model is spread, with the values that mean "not given".
_LAYOUT_FLAGS: dict[str, Any] = {
    "expert_model_parallel_size": None,
    "expert_tensor_parallel_size": None,
    **{field.name: field.default for field in fields(ParallelConfig)},
}
_SHAPE_FLAGS = (
    "decoder_layers",
    "decoder_embed_dim",
    "decoder_ffn_embed_dim",
    "decoder_attention_heads",
    "decoder_learned_pos",
    "share_decoder_input_output_embed",
)


def model_problems(
    saved: Mapping[str, Any], wanted: Any, shapes: Mapping[str, tuple[int, ...]], model: nn.Module
) -> list[str]:
    """List the differences that keep a checkpoint's tensors from loading, one phrase each.

    Args:
        saved: the checkpoint's model configuration.
        wanted: this run's model configuration.
        shapes: of the checkpoint's tensors, with this rank's experts.
        model: this run's model; its shapes are compared where it is not sharded.
    """
    problems = []
    for name in _SHAPE_FLAGS:
        if name in saved and saved[name] != getattr(wanted, name, None):
            problems.append(_differs(name, saved[name], getattr(wanted, name, None)))
    old, new = MoEConfig.from_args(saved), MoEConfig.from_args(wanted)
    for name, of_checkpoint, of_run in (
        ("moe_freq", old.moe_freq, new.moe_freq),
        (_expert_flag(new), old.num_experts, new.num_experts),
        ("moe_top1_expert", old.moe_top1_expert, new.moe_top1_expert),
        ("moe_router_topk", old.megatron.top_k, new.megatron.top_k),
        ("moe_layer_freq", old.megatron.moe_layer_freq, new.megatron.moe_layer_freq),
        (
            "alternate_decoder_ffn_embed_dim",
            old.alternate_decoder_ffn_embed_dim,
            new.alternate_decoder_ffn_embed_dim,
        ),
        (
            "moe_shared_expert_intermediate_size",
            old.megatron.moe_shared_expert_intermediate_size,
            new.megatron.moe_shared_expert_intermediate_size,
        ),
    ):
        if of_checkpoint != of_run:
            problems.append(_differs(name, of_checkpoint, of_run))
    old_width = old.expert_dim or saved.get("decoder_ffn_embed_dim")
    new_width = new.expert_dim or wanted.decoder_ffn_embed_dim
    if new.enabled and old.enabled and old_width != new_width:
        problems.append(_differs("moe_expert_ffn_dim", old_width, new_width))
    return problems or ([] if any_flattened(model.parameters()) else shape_problems(shapes, model))


def _expert_flag(config: MoEConfig) -> str:
    return "num_experts" if config.megatron.selected else "moe_expert_count"


def _differs(name: str, saved: Any, wanted: Any) -> str:
    flag = "--" + name.replace("_", "-")
    return f"{flag} is {saved} in the checkpoint and {wanted} in this run"


def forget_layout(model_cfg: Any) -> None:
    """Forget over which ranks a model was spread in training: who only uses it spreads it over the ranks there are."""
    with open_dict(model_cfg):
        for name, absent in _LAYOUT_FLAGS.items():
            if name in model_cfg:
                model_cfg[name] = absent


def override_new_flags(model_cfg: Any, overrides: dict[str, Any]) -> None:
    """Override flags that the file lacks, as those of the branch or of an older version do; stock does the others."""
    with open_dict(model_cfg):
        for flag in fields(MoEConfig):
            if flag.name in overrides:
                model_cfg[flag.name] = overrides[flag.name]
