"""List which of our tensors is made of which of Hugging Face's, with shapes: one table for both directions.

Each of our tensors is made of blocks, and each block is one tensor of the other side: the gate matrix is the
upper half of the rows of ``fc1``, the up matrix the lower half; with per-expert names every expert is a block
of the stack, with fused names the stack is one block.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from fairseq_moe.convert.hf.families import FAMILIES
from fairseq_moe.convert.hf.layout import OUR_WAY, Layout, stored_shape
from fairseq_moe.convert.spec import ModelSpec

__all__ = ["Block", "OurTensor", "copied_names", "is_fused", "mtp_prefix", "tensor_table"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Place a tensor of the other side in one of ours.

    Args:
        name: Hugging Face's.
        shape: of the block, Hugging Face's.
        expert: global id of the expert whose row of our stack this is; None: not of one expert.
        first_row: where it starts on the axis of output features.
        layout: how each expert of a stack lies on the other side.
    """

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    first_row: int = 0
    layout: Layout = OUR_WAY


@dataclass(frozen=True, kw_only=True, slots=True)
class OurTensor:
    """Name one of our tensors, and the blocks that it is made of.

    Args:
        name: ours.
        shape: whole, with all E experts.
        blocks: what it is made of; together they cover it.
    """

    name: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]


def is_fused(names: Iterable[str]) -> bool:
    """Tell whether a checkpoint with these names stacks its experts, as transformers 5 does in memory."""
    return any(name.endswith(".experts.gate_up_proj") for name in names)


def mtp_prefix(spec: ModelSpec, block: int) -> str:
    """Give the prefix of prediction block ``block``: Hugging Face counts it after the last layer of the decoder."""
    return f"model.layers.{spec.num_layers + block}."


def copied_names(spec: ModelSpec) -> dict[str, str]:
    """Map names under which a checkpoint may repeat a tensor to the name of the tensor."""
    head = "model.embed_tokens.weight" if spec.tied else "lm_head.weight"
    copies = {"lm_head.weight": "model.embed_tokens.weight"} if spec.tied else {}
    for block in range(spec.mtp_layers):
        copies[mtp_prefix(spec, block) + "embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[mtp_prefix(spec, block) + "shared_head.head.weight"] = head
    return copies


def tensor_table(spec: ModelSpec, *, fused: bool) -> list[OurTensor]:
    """List every tensor of the model, in its order.

    Args:
        spec: what the model is.
        fused: experts are stacked on the other side too; always those of a family that is published so.
    """
    dim, vocab = spec.model_dim, spec.vocab_size
    table = [_same("decoder.embed_tokens.weight", "model.embed_tokens.weight", (vocab, dim))]
    for index, is_moe in enumerate(spec.moe_layers):
        table += _layer(spec, f"decoder.layers.{index}.", f"model.layers.{index}.", is_moe, fused)
    table.append(_same("decoder.layer_norm.weight", "model.norm.weight", (dim,)))
    if not spec.tied:
        table.append(_same("decoder.output_projection.weight", "lm_head.weight", (vocab, dim)))
    for block in range(spec.mtp_layers):
        ours, theirs = f"decoder.mtp.{block}.", mtp_prefix(spec, block)
        table += [
            _same(f"{ours}embed_norm.weight", f"{theirs}enorm.weight", (dim,)),
            _same(f"{ours}hidden_norm.weight", f"{theirs}hnorm.weight", (dim,)),
            _same(f"{ours}proj.weight", f"{theirs}eh_proj.weight", (dim, 2 * dim)),
            *_layer(spec, f"{ours}layer.", theirs, True, fused),
            _same(f"{ours}norm.weight", f"{theirs}shared_head.norm.weight", (dim,)),
        ]
    return table


def _same(ours: str, theirs: str, shape: tuple[int, ...]) -> OurTensor:
    return OurTensor(name=ours, shape=shape, blocks=(Block(name=theirs, shape=shape),))


def _stack(ours: str, theirs: str, shape: tuple[int, ...], layout: Layout) -> OurTensor:
    block = Block(name=theirs, shape=stored_shape(shape, layout), layout=layout)
    return OurTensor(name=ours, shape=shape, blocks=(block,))


def _layer(spec: ModelSpec, ours: str, theirs: str, is_moe: bool, fused: bool) -> Iterator[OurTensor]:
    dim = (spec.model_dim,)
    yield _same(f"{ours}self_attn_layer_norm.weight", f"{theirs}input_layernorm.weight", dim)
    attention = _grouped_attention if spec.mla is None else _latent_attention
    yield from attention(spec, f"{ours}self_attn.", f"{theirs}self_attn.")
    yield _same(f"{ours}final_layer_norm.weight", f"{theirs}post_attention_layernorm.weight", dim)
    if is_moe:
        yield from _moe(spec, f"{ours}moe_layer.", theirs, fused)
    else:
        assert spec.dense_ffn_dim is not None
        yield from _glu(ours, f"{theirs}mlp.", spec.model_dim, spec.dense_ffn_dim)


def _grouped_attention(spec: ModelSpec, ours: str, theirs: str) -> Iterator[OurTensor]:
    dim = spec.model_dim
    q_dim, kv_dim = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    for name, other, shape in (
        ("q_proj", "q_proj", (q_dim, dim)),
        ("k_proj", "k_proj", (kv_dim, dim)),
        ("v_proj", "v_proj", (kv_dim, dim)),
        ("out_proj", "o_proj", (dim, q_dim)),
    ):
        yield _same(f"{ours}{name}.weight", f"{theirs}{other}.weight", shape)
        if spec.attention_bias == "all" or (spec.attention_bias == "qkv" and name != "out_proj"):
            yield _same(f"{ours}{name}.bias", f"{theirs}{other}.bias", shape[:1])
    if spec.sinks:
        yield _same(f"{ours}sinks", f"{theirs}sinks", (spec.num_heads,))
    if spec.qk_norm != "none":
        per_head = spec.qk_norm == "head"
        others = FAMILIES[spec.family].head_norms
        for name, other, size in zip(("q_norm", "k_norm"), others, (q_dim, kv_dim), strict=True):
            shape_1 = (spec.head_dim if per_head else size,)
            yield _same(f"{ours}{name}.weight", f"{theirs}{other}.weight", shape_1)


def _latent_attention(spec: ModelSpec, ours: str, theirs: str) -> Iterator[OurTensor]:
    assert spec.mla is not None
    mla, dim, heads = spec.mla, spec.model_dim, spec.num_heads
    if mla.q_lora_rank is None:
        yield _same(f"{ours}q_proj.weight", f"{theirs}q_proj.weight", (heads * spec.head_dim, dim))
    else:
        rank = mla.q_lora_rank
        yield _same(f"{ours}q_a_proj.weight", f"{theirs}q_a_proj.weight", (rank, dim))
        yield _same(f"{ours}q_a_norm.weight", f"{theirs}q_a_layernorm.weight", (rank,))
        yield _same(f"{ours}q_b_proj.weight", f"{theirs}q_b_proj.weight", (heads * spec.head_dim, rank))
    rank = mla.kv_lora_rank
    kv_dim = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    yield _same(
        f"{ours}kv_a_proj.weight", f"{theirs}kv_a_proj_with_mqa.weight", (rank + mla.qk_rope_head_dim, dim)
    )
    yield _same(f"{ours}kv_a_norm.weight", f"{theirs}kv_a_layernorm.weight", (rank,))
    yield _same(f"{ours}kv_b_proj.weight", f"{theirs}kv_b_proj.weight", (kv_dim, rank))
    yield _same(f"{ours}out_proj.weight", f"{theirs}o_proj.weight", (dim, heads * mla.v_head_dim))


def _rows(count: int | None) -> tuple[int, ...]:
    return () if count is None else (count,)


def _glu(
    ours: str, theirs: str, dim: int, hidden: int, *, in_rows: tuple[str, str] | None = None
) -> Iterator[OurTensor]:
    """List the tensors of a SwiGLU network: the gate's rows, then those of up, then down.

    Args:
        ours: prefix of our names.
        theirs: of theirs.
        dim: D.
        hidden: width.
        in_rows: names of two matrices of theirs that lie as ours do; None: there are three.
    """
    if in_rows is not None:
        yield _same(f"{ours}fc1.weight", f"{theirs}{in_rows[0]}.weight", (2 * hidden, dim))
        yield _same(f"{ours}fc2.weight", f"{theirs}{in_rows[1]}.weight", (dim, hidden))
        return
    yield OurTensor(
        name=f"{ours}fc1.weight",
        shape=(2 * hidden, dim),
        blocks=(
            Block(name=f"{theirs}gate_proj.weight", shape=(hidden, dim)),
            Block(name=f"{theirs}up_proj.weight", shape=(hidden, dim), first_row=hidden),
        ),
    )
    yield _same(f"{ours}fc2.weight", f"{theirs}down_proj.weight", (dim, hidden))


def _moe(spec: ModelSpec, ours: str, theirs: str, fused: bool) -> Iterator[OurTensor]:
    dim, hidden, num_experts = spec.model_dim, spec.expert_ffn_dim, spec.routing.num_experts
    family = FAMILIES[spec.family]
    names = family.names(fused=fused)
    layer, theirs = theirs, theirs + names.network
    yield _same(f"{ours}router.weight", f"{theirs}{names.router}", (num_experts, dim))
    if spec.routing.logits_bias:
        yield _same(f"{ours}router.bias", f"{theirs}{names.router_bias}", (num_experts,))
    if spec.routing.expert_bias:
        yield OurTensor(
            name=f"{ours}router.expert_bias",
            shape=(num_experts,),
            blocks=(
                Block(name=f"{theirs}{names.expert_bias}", shape=(*_rows(names.bias_rows), num_experts)),
            ),
        )
    stacked = (num_experts, 2 * hidden, dim), (num_experts, dim, hidden)
    if names.stacked is not None:
        gate_up, down = (f"{theirs}{name}" for name in names.stacked)
        yield _stack(f"{ours}experts.fc1_weight", gate_up, stacked[0], family.gate_up)
        yield _stack(f"{ours}experts.fc2_weight", down, stacked[1], family.down)
        if spec.ffn_bias:
            # A vector cannot be transposed.
            of_gate_up = replace(family.gate_up, transposed=False)
            yield _stack(f"{ours}experts.fc1_bias", f"{gate_up}_bias", stacked[0][:2], of_gate_up)
            yield _stack(f"{ours}experts.fc2_bias", f"{down}_bias", stacked[1][:2], OUR_WAY)
    else:
        fc1, fc2 = [], []
        for expert in range(num_experts):
            own = f"{theirs}experts.{expert}."
            fc1 += [
                Block(name=f"{own}{names.gate}.weight", shape=(hidden, dim), expert=expert),
                Block(name=f"{own}{names.up}.weight", shape=(hidden, dim), expert=expert, first_row=hidden),
            ]
            fc2.append(Block(name=f"{own}{names.down}.weight", shape=(dim, hidden), expert=expert))
        yield OurTensor(name=f"{ours}experts.fc1_weight", shape=stacked[0], blocks=tuple(fc1))
        yield OurTensor(name=f"{ours}experts.fc2_weight", shape=stacked[1], blocks=tuple(fc2))
    if spec.shared_ffn_dim is not None:
        place = f"{theirs}{names.shared}" if names.beside is None else layer + names.beside
        yield from _glu(f"{ours}shared_experts.", place, dim, spec.shared_ffn_dim, in_rows=names.beside_rows)
        if spec.shared_gate:
            yield _same(f"{ours}shared_experts.gate.weight", f"{theirs}{names.shared_gate}", (1, dim))
