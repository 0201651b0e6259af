"""Count as Megatron-Core does: states by its ``theoretical_memory_usage.py``, activations by what its layers keep.

Its rules, restated: attention, dense and shared networks are divided over tensor ranks, norms and routers are whole,
experts lie over E X ranks, layers over the pipeline in equal (even fractional) shares; the most loaded stage has the
word embedding and the blocks that guess further, and the output projection if it is the only one. Optimizer states are
sharded over all ranks of a tensor place, those of experts over the ranks that hold the same ones. Norms of queries and
keys are not counted.
"""

from dataclasses import dataclass
from fractions import Fraction

from fairseq_moe.parallel.schedule import peak_activations, with_dummies
from fairseq_moe.planner.mapping import Mapping
from fairseq_moe.planner.plan import StagePlan
from fairseq_moe.planner.shape import ModelShape

__all__ = [
    "MegatronActivations",
    "MegatronStates",
    "layer_activations",
    "layers_in_flight",
    "megatron_stages",
    "megatron_states",
]

_WEIGHT_AND_GRAD = 6  # bfloat16, and a float32 gradient
_OPTIMIZER = 12  # a float32 copy and two moments
_HALF = 2
_WIDE = 4
# Float32 scores and a map of bits beside the logits: with them DeepSeek-V3's layer has the 2236 MiB that the report's
# Table 3 (arXiv 2603.07685) comes to. Its other parts, as listed there, leave these 5 MiB.
_SCORES_APART = 5


@dataclass(frozen=True, kw_only=True)
class MegatronStates:
    """Hold Megatron's numbers of parameters of a rank, and their bytes.

    Args:
        dense: parameters but those of experts, on the most loaded stage.
        expert: parameters of experts there.
        other_stage: parameters of a rank of any other stage.
        dense_shards: ranks over which optimizer states are sharded.
        expert_shards: the same of experts.
    """

    dense: Fraction
    expert: Fraction
    other_stage: Fraction
    dense_shards: int
    expert_shards: int

    @property
    def parameters(self) -> Fraction:
        """Parameters of a rank of the most loaded stage."""
        return self.dense + self.expert

    @property
    def weight_and_grad_bytes(self) -> Fraction:
        """Bytes of weights and gradients there."""
        return self.parameters * _WEIGHT_AND_GRAD

    @property
    def optimizer_bytes(self) -> Fraction:
        """Bytes of copies and moments there, with the distributed optimizer."""
        return _OPTIMIZER * (self.dense / self.dense_shards + self.expert / self.expert_shards)

    @property
    def total_bytes(self) -> Fraction:
        """Bytes of all of it."""
        return self.weight_and_grad_bytes + self.optimizer_bytes


def _attention(shape: ModelShape) -> int:
    latent = shape.latent
    if latent is None:
        biases = shape.query_width + 2 * shape.key_width if shape.attention_bias != "none" else 0
        return 2 * shape.dim * (shape.query_width + shape.key_width) + biases
    query = shape.dim * shape.query_width
    if latent.q_rank:
        query = latent.q_rank * (shape.dim + shape.query_width + 1)
    keys = shape.num_heads * (latent.nope_dim + latent.value_dim)
    key = latent.kv_rank * (shape.dim + keys + 1) + shape.dim * latent.rope_dim
    return query + key + shape.attended_width * shape.dim


def megatron_states(shape: ModelShape, mapping: Mapping) -> MegatronStates:
    """Count parameters and bytes of the most loaded rank, bfloat16 with the distributed optimizer."""
    grid, matrices = mapping.grid, shape.num_expert_matrices
    num_moe = sum(shape.is_moe)
    num_dense = shape.num_layers - num_moe
    attention, norms = _attention(shape), 2 * shape.dim * (1 if shape.is_rms else 2)
    dense_layer = attention + matrices * shape.dim * shape.ffn_dim
    moe_layer = attention + matrices * shape.dim * shape.shared_dim
    router = shape.dim * shape.num_experts + (shape.dim if shape.has_shared_gate else 0)
    experts = matrices * shape.dim * shape.expert_dim * shape.num_experts
    divided = Fraction(num_dense * dense_layer + num_moe * moe_layer, grid.tensor)
    whole = shape.num_layers * norms + num_moe * router + norms // 2
    spread = grid.expert * grid.expert_tensor
    dense = Fraction(divided + whole, grid.pipe)
    expert = Fraction(num_moe * experts, spread * grid.pipe)
    other = dense + expert
    words = Fraction(shape.num_words * shape.dim, grid.tensor)
    dense += words * (2 if grid.pipe == 1 and not shape.is_tied else 1)
    blocks = shape.mtp_layers
    dense += blocks * (Fraction(moe_layer, grid.tensor) + norms + router)
    expert += Fraction(blocks * experts, spread)
    return MegatronStates(
        dense=dense,
        expert=expert,
        other_stage=other,
        dense_shards=grid.world_size // (grid.tensor * grid.pipe),
        expert_shards=grid.world_size // (spread * grid.pipe),
    )


@dataclass(frozen=True, kw_only=True)
class MegatronActivations:
    """Hold the bytes that a layer keeps of a micro-batch, by part, in bfloat16 with flash attention.

    Args:
        parts: bytes by what they are.
        input_bytes: of the layer's input alone, which full recomputation keeps.
    """

    parts: dict[str, Fraction]
    input_bytes: Fraction

    @property
    def total(self) -> Fraction:
        """Bytes of all parts."""
        return sum(self.parts.values(), Fraction(0))


def layer_activations(
    shape: ModelShape, mapping: Mapping, *, is_moe: bool, probabilities_after: bool = False
) -> MegatronActivations:
    """Count what one of Megatron's layers keeps of a micro-batch.

    Args:
        shape: of the model.
        mapping: of the run.
        is_moe: whether the layer has experts.
        probabilities_after: outputs are multiplied by routing probabilities after the second product, and kept.
    """
    own, whole, dim = mapping.own_tokens, mapping.context_tokens, shape.dim
    tensor, parts = mapping.grid.tensor, mapping.grid.expert_tensor
    found: dict[str, int | Fraction] = {
        "residuals": 2 * (_HALF * own * dim),
        "norms": 2 * _HALF * own * dim,
        "log-sum-exp": Fraction(_WIDE * whole * shape.num_heads, tensor),
        "attention output": Fraction(_HALF * whole * shape.attended_width, tensor),
        **_looked_at(shape, whole, own, tensor),
    }
    if is_moe:
        rows = Fraction(whole * shape.top_k * parts, tensor)
        width = Fraction(shape.expert_dim, parts)
        found |= {
            "router": own * shape.num_experts * (_WIDE + (_SCORES_APART if shape.scores_apart else 0)),
            "permuted rows": _HALF * rows * dim,
            "fc1": 2 * _HALF * rows * width,
            "activation": _HALF * rows * width,
            "shared experts": Fraction(_HALF * 3 * whole * shape.shared_dim, tensor),
        }
        if probabilities_after:
            found["fc2"] = _HALF * rows * dim
    else:
        found["network"] = Fraction(_HALF * 3 * whole * shape.ffn_dim, tensor)
    return MegatronActivations(
        parts={name: Fraction(size) for name, size in found.items()}, input_bytes=Fraction(_HALF * own * dim)
    )


def _looked_at(shape: ModelShape, whole: int, own: int, tensor: int) -> dict[str, int | Fraction]:
    latent = shape.latent
    if latent is None:
        return {
            "queries, keys, values": Fraction(
                _HALF * whole * (shape.query_width + 2 * shape.key_width), tensor
            )
        }
    heads = shape.num_heads
    up = heads * (2 * latent.query_dim + latent.value_dim)
    return {
        "latents": _HALF * own * 2 * (latent.q_rank + latent.kv_rank + latent.rope_dim),
        "queries, keys, values": Fraction(_HALF * whole * up, tensor),
    }


def layers_in_flight(num_layers: int, mapping: Mapping, pipe: int = 0) -> Fraction:
    """Count the layer passes that a rank keeps: of all passes under way, each of its share of the layers."""
    grid, virtual = mapping.grid, mapping.virtual
    if grid.pipe == 1:
        return Fraction(num_layers)
    passes = peak_activations(
        grid.pipe, virtual, with_dummies(grid.pipe, virtual, mapping.micro_batches), pipe
    )
    return Fraction(num_layers * passes, grid.pipe * virtual)


def megatron_stages(shape: ModelShape, mapping: Mapping, *, margin_frac: float) -> tuple[StagePlan, ...]:
    """Count what the most loaded rank of each stage holds, as Megatron would.

    Args:
        shape: of the model.
        mapping: of the run.
        margin_frac: share of all else that is added for what is not modelled.
    """
    states = megatron_states(shape, mapping)
    return tuple(_stage(shape, mapping, states, pipe, margin_frac) for pipe in range(mapping.grid.pipe))


def _stage(
    shape: ModelShape, mapping: Mapping, states: MegatronStates, pipe: int, margin_frac: float
) -> StagePlan:
    grid, virtual = mapping.grid, mapping.virtual
    layers = mapping.layers_of(pipe, shape.num_layers)
    number = states.parameters if pipe == 0 else states.other_stage
    dense = states.dense if pipe == 0 else states.other_stage - states.expert
    expert = number - dense
    passes = peak_activations(
        grid.pipe, virtual, with_dummies(grid.pipe, virtual, mapping.micro_batches), pipe
    )
    kept = Fraction(0)
    for each in layers:
        layer = layer_activations(shape, mapping, is_moe=shape.is_moe[each])
        kept += _after_recompute(layer, mapping)
    activations = int(kept * (Fraction(passes, virtual) if grid.pipe > 1 else 1))
    words = mapping.context_tokens * -(-shape.num_words // grid.tensor)
    logits = words * _WIDE if pipe == grid.pipe - 1 else 0
    optimizer = int(_OPTIMIZER * (dense / states.dense_shards + expert / states.expert_shards))
    parameters, gradients = int(number * _HALF), int(number * _WIDE)
    total = parameters + gradients + optimizer + activations + logits
    return StagePlan(
        pipe=pipe,
        rank=pipe * grid.stage_size,
        layers=len(layers),
        num_parameters=int(number),
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        gathered=0,
        activations=activations,
        passes=passes,
        logits=logits,
        exchange=0,
        margin=int(total * margin_frac),
    )


def _after_recompute(layer: MegatronActivations, mapping: Mapping) -> Fraction:
    if "layers" in mapping.recompute:
        return layer.input_bytes
    dropped = {"fc1", "activation"} if mapping.recompute & {"moe", "experts"} else set()
    return sum((size for name, size in layer.parts.items() if name not in dropped), Fraction(0))
