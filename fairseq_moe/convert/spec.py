"""Describe a model in the words of no library: the common ground of config.json and of our flags."""

from dataclasses import dataclass, field, fields

from fairseq_moe.modules.blocks.rope import YarnConfig

__all__ = ["Mla", "ModelSpec", "Rope", "Routing", "differences"]


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Describe a rotary position embedding.

    Args:
        theta: base of the frequencies.
        interleaved: pairs (2i, 2i+1) are rotated instead of (i, i + d/2).
        fraction: share of each head that is rotated, from its beginning.
        yarn: scaling of the frequencies; None: none.
    """

    theta: float
    interleaved: bool = False
    fraction: float = 1.0
    yarn: YarnConfig | None = None


@dataclass(frozen=True, kw_only=True)
class Mla:
    """Describe the sizes of multi-head latent attention.

    Args:
        q_lora_rank: of the compressed query; None: queries are not compressed.
        kv_lora_rank: of the compressed keys and values.
        qk_nope_head_dim: part of a head's query and key without position.
        qk_rope_head_dim: part with position; the key's is shared by all heads.
        v_head_dim: of a head's value.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Describe how experts are chosen and weighed.

    Args:
        num_experts: E of each MoE layer.
        top_k: experts per token.
        score: ``softmax`` or ``sigmoid``.
        normalized: the chosen weights are divided by their sum.
        scaling: multiplies the weights.
        num_groups: groups of neighbouring experts; None: no groups.
        group_topk: groups from which a token may choose.
        group_score: ``max`` or ``best_two``.
        expert_bias: a bias per expert moves choices, not weights.
        logits_bias: the router's map has a learned bias.
        aux_loss_coeff: weight of the balancing loss.
        aux_loss_per_sequence: the loss balances each sequence.
    """

    num_experts: int
    top_k: int
    score: str = "softmax"
    normalized: bool = False
    scaling: float = 1.0
    num_groups: int | None = None
    group_topk: int | None = None
    group_score: str | None = None
    expert_bias: bool = False
    logits_bias: bool = False
    aux_loss_coeff: float = field(default=0.0, compare=False)
    aux_loss_per_sequence: bool = field(default=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Describe one decoder-only mixture-of-experts model with RMSNorm and SwiGLU.

    Fields without effect on a forward pass do not take part in comparisons.

    Args:
        family: Hugging Face's ``model_type``.
        vocab_size: V.
        model_dim: D.
        num_layers: of the decoder, without multi-token prediction.
        num_heads: query heads.
        num_kv_heads: key and value heads (equal to ``num_heads`` with MLA).
        head_dim: of queries and keys (with MLA: both parts together).
        attention_bias: ``none``, ``qkv`` or ``all``.
        qk_norm: ``none``, ``head`` (over each head) or ``full`` (over all of a projection).
        qk_norm_after_rope: heads are normalised after they turn.
        clip_qkv: bound of queries, keys and values; None: none.
        sinks: each head has a learned logit that takes part in the softmax and has no value.
        window: tokens that a query sees in the layers of ``window_layers``, itself included; None: all earlier ones.
        window_layers: for each layer whether it has the window; empty without one.
        mla: sizes of latent attention; None: grouped-query attention.
        rope: positions.
        embedding_multiplier: of embeddings.
        residual_multiplier: of what attention and networks add.
        attention_multiplier: of the scores of attention; None: one over the root of a head's size.
        logits_scaling: divides the logits.
        norm_eps: of every norm but those inside MLA.
        ffn_bias: networks and experts have biases.
        swiglu_limit: bound of the values that SwiGLU multiplies, in gpt-oss's form of it; None: the usual form.
        swiglu_alpha: factor within the sigmoid of that form.
        dense_ffn_dim: width of the feed-forward network in layers without experts; None: there are none.
        expert_ffn_dim: width of an expert.
        shared_ffn_dim: width of the network that every token passes; None: none.
        shared_gate: its output is scaled by a learned sigmoid.
        moe_layers: for each layer whether it has experts.
        routing: see there.
        mtp_layers: multi-token prediction blocks.
        tied: the output projection is the embedding.
        max_positions: longest sequence.
        init_std: of the weights at the start of training.
        attention_dropout: while training.
    """

    family: str
    vocab_size: int
    model_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    attention_bias: str = "none"
    qk_norm: str = "none"
    qk_norm_after_rope: bool = False
    clip_qkv: float | None = None
    sinks: bool = False
    window: int | None = None
    window_layers: tuple[bool, ...] = ()
    mla: Mla | None = None
    rope: Rope
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    logits_scaling: float = 1.0
    norm_eps: float
    ffn_bias: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float | None = None
    dense_ffn_dim: int | None = None
    expert_ffn_dim: int
    shared_ffn_dim: int | None = None
    shared_gate: bool = False
    moe_layers: tuple[bool, ...]
    routing: Routing
    mtp_layers: int = 0
    tied: bool = False
    max_positions: int = field(compare=False)
    init_std: float = field(default=0.02, compare=False)
    attention_dropout: float = field(default=0.0, compare=False)


def differences(expected: ModelSpec, found: ModelSpec) -> list[str]:
    """List one phrase for each field that matters and differs."""
    return [
        f"{entry.name} is {getattr(found, entry.name)!r}, expected {getattr(expected, entry.name)!r}"
        for entry in fields(ModelSpec)
        if entry.compare and getattr(expected, entry.name) != getattr(found, entry.name)
    ]
