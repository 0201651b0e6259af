"""Read the sizes of a model out of parsed flags: whole numbers, from which all else follows."""

from dataclasses import dataclass
from typing import Any

from fairseq_moe.flags.blocks import BlocksConfig
from fairseq_moe.flags.freezing import frozen_modules
from fairseq_moe.flags.moe import MoEConfig
from fairseq_moe.flags.records import getter

__all__ = ["LatentShape", "ModelShape", "shape_of"]


@dataclass(frozen=True, kw_only=True)
class LatentShape:
    """Hold the sizes of latent attention.

    Args:
        kv_rank: of the latent that keys and values are made from.
        q_rank: the same for queries; 0: queries are linear in x.
        nope_dim: of each head's part without positions.
        rope_dim: of its part with positions.
        value_dim: of each head's values.
    """

    kv_rank: int
    q_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int

    @property
    def query_dim(self) -> int:
        """Size of a head's query."""
        return self.nope_dim + self.rope_dim


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Hold what a decoder is made of.

    Args:
        num_words: V, rows of the word embedding.
        dim: D, model width.
        num_heads: query heads.
        num_kv_heads: key heads, without latents.
        head_dim: size of a head, without latents.
        latent: sizes of latent attention; None: heads are grouped.
        ffn_dim: hidden width of a dense network.
        alternate_ffn_dim: the same at the positions of ``is_alternate``.
        is_moe: by layer, whether it has experts.
        is_alternate: by layer, whether its dense network has the other width.
        num_experts: E, of a layer.
        top_k: K, experts of a token.
        expert_dim: F, hidden width of an expert.
        shared_dim: width of the network that every token passes; 0: none.
        has_shared_gate: whether a learned gate scales its output.
        is_cosine: X-MoE's router.
        scores_apart: whether each expert is scored by itself (sigmoid), not beside the others.
        has_expert_bias: whether choices are balanced by a bias, a buffer.
        has_router_bias: whether logits have a learned bias, a parameter.
        is_gated: SwiGLU networks.
        has_ffn_bias: whether networks have biases, dense, shared and expert ones.
        is_clamped: SwiGLU with both halves clamped.
        own_blocks: our blocks, not stock's.
        is_rms: RMSNorm, one vector per norm, not LayerNorm with two.
        attention_bias: which projections have a bias: ``none``, ``qkv`` or ``all``.
        qk_norm: ``none``, ``head`` or ``full``.
        has_sinks: each query head has one more score.
        windows: by layer, positions that a query sees; 0: all earlier ones.
        has_rotary: whether heads turn with their positions.
        num_positions: rows of learned positions; 0: none are learned.
        embedding_norm: whether a norm follows the embedding.
        final_norm: whether one follows the last layer.
        is_tied: words are embedded and scored by the same matrix.
        in_dim: width of the word embedding.
        out_dim: width that is scored.
        mtp_layers: blocks that guess further tokens.
        trains_mtp: whether they have a loss.
        frozen: ``routers``, ``experts``, both or neither, which are not trained.
        capacity_factor: rows of an expert over its mean; 0: no limit, or the branch's gates.
        is_branch: the moe branch's gates.
        router_is_float32: whether logits are computed in float32.
        has_dropout: whether what blocks add is dropped in training.
        activation: of networks without gates.
        uses_fused_attention: stock's attention by torch's fused kernel.
    """

    num_words: int
    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    latent: LatentShape | None
    ffn_dim: int
    alternate_ffn_dim: int
    is_moe: tuple[bool, ...]
    is_alternate: tuple[bool, ...]
    num_experts: int
    top_k: int
    expert_dim: int
    shared_dim: int
    has_shared_gate: bool
    is_cosine: bool
    scores_apart: bool
    has_expert_bias: bool
    has_router_bias: bool
    is_gated: bool
    has_ffn_bias: bool
    is_clamped: bool
    own_blocks: bool
    is_rms: bool
    attention_bias: str
    qk_norm: str
    has_sinks: bool
    windows: tuple[int, ...]
    has_rotary: bool
    num_positions: int
    embedding_norm: bool
    final_norm: bool
    is_tied: bool
    in_dim: int
    out_dim: int
    mtp_layers: int
    trains_mtp: bool
    frozen: frozenset[str]
    capacity_factor: float
    is_branch: bool
    router_is_float32: bool
    has_dropout: bool
    activation: str
    uses_fused_attention: bool

    def __hash__(self) -> int:
        """Hash what tells models apart at little cost; equality compares all."""
        return hash((self.num_words, self.dim, self.num_experts, self.expert_dim, len(self.is_moe)))

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.is_moe)

    @property
    def has_experts(self) -> bool:
        """Tell whether any layer has experts."""
        return any(self.is_moe)

    @property
    def query_width(self) -> int:
        """Width of all queries."""
        return self.num_heads * (self.head_dim if self.latent is None else self.latent.query_dim)

    @property
    def key_width(self) -> int:
        """Width of all keys of grouped attention; so wide are its values."""
        return self.num_kv_heads * self.head_dim

    @property
    def attended_width(self) -> int:
        """Width of what all heads give, before the output projection."""
        return self.num_heads * (self.head_dim if self.latent is None else self.latent.value_dim)

    @property
    def num_expert_matrices(self) -> int:
        """Matrices of D x F of a network: gate, up and down, or two."""
        return 3 if self.is_gated else 2

    def dense_dim(self, layer: int) -> int:
        """Return the hidden width of a layer's dense network."""
        return self.alternate_ffn_dim if self.is_alternate[layer] else self.ffn_dim


def shape_of(args: Any, *, num_words: int, padding_index: int) -> ModelShape:
    """Read the sizes that a model built from these flags has.

    Args:
        args: the model's flags, with the architecture's values filled in.
        num_words: V, of the dictionary.
        padding_index: the dictionary's; learned positions count from it.
    """
    moe, blocks, get = MoEConfig.from_args(args), BlocksConfig.from_args(args), getter(args)
    dim, heads = int(get("decoder_embed_dim")), int(get("decoder_attention_heads"))
    layers = range(int(get("decoder_layers")))
    has_experts = moe.enabled
    positions = 0
    if (
        not get("no_token_positional_embeddings")
        and blocks.position_embedding is None
        and get("decoder_learned_pos")
    ):
        positions = int(get("max_target_positions") or get("tokens_per_sample")) + padding_index + 1
    ends_with_norm = bool(blocks.enabled or get("decoder_normalize_before")) and not get(
        "no_decoder_final_norm"
    )
    capacity = moe.megatron.moe_expert_capacity_factor or 0.0
    return ModelShape(
        num_words=num_words,
        dim=dim,
        num_heads=heads,
        num_kv_heads=blocks.decoder_kv_heads or heads,
        head_dim=blocks.head_dim(dim, heads),
        latent=_latent_of(blocks),
        ffn_dim=int(get("decoder_ffn_embed_dim")),
        alternate_ffn_dim=moe.alternate_decoder_ffn_embed_dim,
        is_moe=tuple(has_experts and moe.is_moe_layer(index) for index in layers),
        is_alternate=tuple(moe.is_pseudo_moe and moe.is_moe_layer(index) for index in layers),
        num_experts=moe.num_experts if has_experts else 0,
        top_k=moe.top_k if has_experts else 0,
        expert_dim=(moe.expert_dim or int(get("decoder_ffn_embed_dim"))) if has_experts else 0,
        shared_dim=moe.megatron.moe_shared_expert_intermediate_size or 0,
        has_shared_gate=moe.megatron.moe_shared_expert_gate,
        is_cosine=moe.megatron.use_xmoe,
        scores_apart=moe.megatron.score_function != "softmax",
        has_expert_bias=moe.bias_config() is not None,
        has_router_bias=moe.megatron.moe_router_bias,
        is_gated=blocks.gated_ffn,
        has_ffn_bias=blocks.gated_ffn_bias or not blocks.gated_ffn,
        is_clamped=blocks.swiglu_limit is not None,
        own_blocks=blocks.enabled,
        is_rms=blocks.decoder_normalization == "rmsnorm",
        attention_bias=blocks.attention_bias or ("none" if blocks.is_latent else "all"),
        qk_norm=blocks.qk_norm or "none",
        has_sinks=blocks.attention_sinks,
        windows=tuple(window or 0 for window in blocks.windows(len(layers))),
        has_rotary=blocks.position_embedding == "rope",
        num_positions=positions,
        embedding_norm=bool(get("layernorm_embedding")),
        final_norm=ends_with_norm,
        is_tied=bool(get("share_decoder_input_output_embed")),
        in_dim=int(get("decoder_input_dim") or dim),
        out_dim=int(get("decoder_output_dim") or dim),
        mtp_layers=blocks.mtp_layers,
        trains_mtp=blocks.mtp_loss_weight > 0,
        frozen=frozen_modules(args) if has_experts else frozenset(),
        capacity_factor=max(capacity, 0.0),
        is_branch=has_experts and not moe.megatron.selected,
        router_is_float32=moe.megatron.moe_router_dtype is not None or moe.moe_gating_use_fp32,
        has_dropout=(get("dropout") or 0) > 0,
        activation=str(get("activation_fn") or "relu"),
        uses_fused_attention=moe.fused_attention,
    )


def _latent_of(blocks: BlocksConfig) -> LatentShape | None:
    if blocks.kv_lora_rank is None:
        return None
    assert blocks.qk_nope_head_dim and blocks.qk_rope_head_dim and blocks.v_head_dim
    return LatentShape(
        kv_rank=blocks.kv_lora_rank,
        q_rank=blocks.q_lora_rank or 0,
        nope_dim=blocks.qk_nope_head_dim,
        rope_dim=blocks.qk_rope_head_dim,
        value_dim=blocks.v_head_dim,
    )
