"""Count the bytes that autograd keeps of a forward pass, by what each part of a layer keeps for its backward pass.

tests/unit/planner/test_activations.py compares with the storages that autograd keeps. Two paths differ, and both are
here: on a GPU RMSNorm in float32 keeps its input alone, and attention's output is kept once. Of experts the GPU's path
is modelled, which keeps values before the activation (``modules.kernels.lean``); a CPU with units for bfloat16 keeps
those after GELU as well. Rows lie evenly on the ranks.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fairseq_moe.modules.blocks.sink import num_further_values
from fairseq_moe.modules.blocks.window import block_size, saves_keys
from fairseq_moe.parallel.schedule import actions, peak_activations, with_dummies
from fairseq_moe.planner.mapping import Mapping
from fairseq_moe.planner.shape import ModelShape

__all__ = ["Activations", "StageActivations"]

_WIDE = 4  # bytes of a float32
_ID = 8  # bytes of an int64
_SIDE_PER_EXPERT = 2  # float32 numbers of a token and expert that a router keeps
_SCHEDULE_ROUNDS = 4  # of P micro-batches, after which a schedule repeats itself


@dataclass(frozen=True, kw_only=True)
class StageActivations:
    """Hold what a rank of a stage keeps at most.

    Args:
        kept: bytes of all passes that are under way, but for scores of words.
        passes: of one micro-batch through one chunk, that are under way.
        logits: bytes of the scores of one micro-batch's words.
        at_work: bytes that one layer, computed again, keeps besides.
    """

    kept: int
    passes: int
    logits: int
    at_work: int


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Count for one model and mapping.

    Args:
        shape: of the model.
        mapping: of the run.
        value_bytes: of a number that layers compute with: 4 or 2.
        on_gpu: which path is counted.
        keeps_probabilities: whether the criterion keeps float32 probabilities of all words, as stock's does.
    """

    shape: ModelShape
    mapping: Mapping
    value_bytes: int
    on_gpu: bool = True
    keeps_probabilities: bool = False

    @property
    def _tokens(self) -> int:
        """Tokens that tensor ranks compute together: t."""
        return self.mapping.context_tokens

    @property
    def _own(self) -> int:
        """Tokens of a rank between blocks: t / T."""
        return self.mapping.own_tokens

    @property
    def _tensor(self) -> int:
        return self.mapping.grid.tensor

    def _is_half(self) -> bool:
        return self.value_bytes < _WIDE

    def _norm(self, width: int, tokens: int, *, is_rms: bool) -> int:
        """Count what a norm keeps, but for its output, which whatever reads it keeps."""
        if not is_rms:
            return tokens * (width * self.value_bytes + 2 * _WIDE)
        if self._is_half():  # the input in float32, and the quotient
            return tokens * (width * (_WIDE + self.value_bytes) + _WIDE)
        copies = 1 if self.on_gpu else 2
        return tokens * (width * copies * self.value_bytes + _WIDE)

    def _input(self, width: int) -> int:
        """Count what products keep of their input: tokens of all tensor ranks."""
        return self._tokens * width * self.value_bytes

    def _dropout(self, width: int, tokens: int) -> int:
        if not self.shape.has_dropout:
            return 0
        return tokens * width * (1 if self.on_gpu else self.value_bytes)

    def _attention(self, window: int) -> int:
        shape, bytes_of, tensor = self.shape, self.value_bytes, self._tensor
        if shape.latent is not None:
            return self._latent_attention()
        found = self._norm(shape.dim, self._own, is_rms=shape.is_rms) + self._input(shape.dim)
        normed = (shape.query_width + shape.key_width) // tensor
        if shape.qk_norm == "full":
            found += self._norm(normed, self._tokens, is_rms=True)
        if shape.qk_norm == "head":
            heads = (shape.num_heads + shape.num_kv_heads) // tensor
            found += self._norm(normed, self._tokens, is_rms=True) + self._tokens * (heads - 1) * _WIDE
        if self.mapping.grid.context > 1:
            found += self._tokens * (shape.query_width + 2 * shape.key_width) // tensor * bytes_of
            return found + self._looked_at(shape.query_width, shape.query_width)
        return found + self._grouped(window if window < self.mapping.length else 0)

    def _grouped(self, window: int) -> int:
        """Count what grouped attention keeps from queries, keys and values on.

        Args:
            window: positions that a query sees, fewer than there are; 0: all.
        """
        shape, bytes_of, tensor, length = self.shape, self.value_bytes, self._tensor, self.mapping.length
        head = shape.head_dim
        if shape.has_sinks:
            head += num_further_values(head, shape.num_heads // shape.num_kv_heads)
        queries, keys = shape.num_heads * head // tensor, 2 * shape.num_kv_heads * head // tensor
        found, is_cut = self._tokens * queries * bytes_of, window > 0 and saves_keys(length, length, window)
        if is_cut:  # a block has keys of its own, and a mask
            per_block = block_size(window) + window - 1 + shape.has_sinks
            found += self._tokens * per_block * (keys + block_size(window)) // block_size(window) * bytes_of
        else:
            mask = length**2 if window else 0
            found += (self._tokens * keys + mask) * bytes_of
        return found + self._looked_at(shape.num_heads * head, shape.query_width, is_cut=is_cut)

    def _looked_at(self, padded: int, attended: int, *, is_cut: bool = False) -> int:
        """Count what attention keeps of its output, and the output projection of its input.

        Over context ranks attention is computed again, and keeps queries, keys and values alone.
        """
        own, bytes_of = self._tokens // self._tensor, self.value_bytes
        if self.mapping.grid.context > 1:
            return own * attended * bytes_of
        is_view = self.on_gpu and padded == attended and self.shape.own_blocks and not is_cut
        copies = 0 if is_view else attended
        return own * ((padded + copies) * bytes_of + self.shape.num_heads * _WIDE)

    def _latent_attention(self) -> int:
        shape, bytes_of, tensor = self.shape, self.value_bytes, self._tensor
        latent = shape.latent
        assert latent is not None
        found = self._norm(shape.dim, self._own, is_rms=shape.is_rms)
        if latent.q_rank:  # projected from own tokens; latents are gathered
            found += self._own * shape.dim * bytes_of
            found += self._norm(latent.q_rank, self._own, is_rms=True) + self._input(latent.q_rank)
        else:
            found += self._input(shape.dim) + (self._own * shape.dim * bytes_of if tensor > 1 else 0)
        found += self._norm(latent.kv_rank, self._own, is_rms=True)
        if not self._is_half():  # the norm's input lies beside the key that turns
            found += self._own * latent.rope_dim * bytes_of
        if self.mapping.grid.context > 1:
            found += (
                self._tokens * (shape.query_width // tensor + latent.kv_rank + latent.rope_dim) * bytes_of
            )
            return found + self._looked_at(shape.query_width, shape.attended_width)
        widest = shape.num_heads * max(latent.query_dim, latent.value_dim)
        found += self._input(latent.kv_rank)
        found += 3 * self._tokens * (widest // tensor) * bytes_of  # queries, keys and values of one size
        return found + self._looked_at(widest, shape.attended_width)

    def _gated_or_not(self, hidden: int, *, is_stock: bool) -> int:
        """Count the bytes of a token in a dense network of a width."""
        if self.shape.is_gated:
            # Gate and up, the opened gate, the product; clamped also the held gate, its sigmoid and the raised half.
            return (7 if self.shape.is_clamped else 4) * hidden * self.value_bytes
        if self.shape.activation == "relu":
            return hidden * self.value_bytes
        before = _WIDE if is_stock and self.shape.activation == "gelu" else self.value_bytes
        return hidden * (before + self.value_bytes)

    def _dense_network(self, hidden: int) -> int:
        shape = self.shape
        found = self._norm(shape.dim, self._own, is_rms=shape.is_rms) + self._input(shape.dim)
        per_token = self._gated_or_not(hidden // self._tensor, is_stock=not shape.own_blocks)
        return found + self._tokens * per_token

    def _rows(self) -> int:
        """Count the rows that a rank's tokens are for experts."""
        shape, tokens = self.shape, self._own
        rows = tokens * shape.top_k
        if self.mapping.dispatcher == "padded":
            return shape.num_experts * -(-int(rows * shape.capacity_factor) // shape.num_experts)
        return min(rows, int(rows * shape.capacity_factor)) if shape.capacity_factor else rows

    def _experts(self) -> int:
        shape, mapping, bytes_of = self.shape, self.mapping, self.value_bytes
        found = self._norm(shape.dim, self._own, is_rms=shape.is_rms) + self._own * shape.dim * bytes_of
        if "moe" in mapping.recompute:
            return found
        found += self._router()
        rows, parts = self._rows(), mapping.grid.expert_tensor
        if mapping.grid.expert * parts > 1:
            if mapping.dispatcher == "allgather":
                found += mapping.grid.expert * parts * self._own * shape.dim * bytes_of
            else:  # rows that arrived, and outputs that came back
                found += rows * (parts + 1) * shape.dim * bytes_of
        if "experts" not in mapping.recompute:
            hidden = (2 if shape.is_gated else 1) * shape.expert_dim
            found += rows * hidden * bytes_of  # each of X parts computes as many rows, 1 / X as wide
        if shape.shared_dim and "shared_experts" not in mapping.recompute:
            found += self._own * self._gated_or_not(shape.shared_dim, is_stock=False)
            found += self._own * shape.dim * bytes_of if shape.has_shared_gate else 0
        return found

    def _router(self) -> int:
        shape = self.shape
        per_token = _SIDE_PER_EXPERT * shape.num_experts * _WIDE + shape.top_k * (2 * _ID + 2 * _WIDE)
        found = self._own * per_token
        if shape.router_is_float32 and not shape.is_branch and self._is_half():
            found += (self._own + shape.num_experts) * shape.dim * _WIDE
        return found

    def layer(self, *, is_moe: bool, hidden: int, window: int) -> int:
        """Count the bytes that a layer keeps of one pass.

        Args:
            is_moe: whether it has experts.
            hidden: width of its dense network.
            window: positions that a query sees; 0: all earlier ones.
        """
        if "layers" in self.mapping.recompute:
            return self._own * self.shape.dim * self.value_bytes
        return self._layer_whole(is_moe=is_moe, hidden=hidden, window=window)

    def _layer_whole(self, *, is_moe: bool, hidden: int, window: int) -> int:
        network = self._experts() if is_moe else self._dense_network(hidden)
        return self._attention(window) + network + 2 * self._dropout(self.shape.dim, self._own)

    def _ends(self, *, is_first: bool, is_last: bool) -> int:
        """Count what is kept before the first layer and after the last one, but for scores."""
        shape, found = self.shape, 0
        if is_first:
            found += self._tokens * _ID + self._dropout(shape.dim, self._own)
            found += self._tokens * _ID if shape.num_positions else 0
            if shape.embedding_norm:
                found += self._norm(shape.dim, self._own, is_rms=False)
        if is_last:
            if shape.final_norm:
                found += self._norm(shape.dim, self._own, is_rms=shape.is_rms)
            found += self._input(shape.out_dim) + self._tokens * _ID
        if is_last and shape.trains_mtp:
            joined = self._tokens * 2 * shape.dim * self.value_bytes
            norms = 3 * self._norm(shape.dim, self._own, is_rms=shape.is_rms)
            layer = self.layer(is_moe=shape.has_experts, hidden=shape.ffn_dim, window=0)
            found += shape.mtp_layers * (joined + norms + layer + self._input(shape.dim))
        return found

    def logits(self) -> int:
        """Count the bytes of the scores of a micro-batch's words; their gradient takes their place."""
        heads = 1 + (self.shape.mtp_layers if self.shape.trains_mtp else 0)
        each = self.value_bytes + (2 * _WIDE if self.keeps_probabilities else 0)
        return heads * self._tokens * -(-self.shape.num_words // self._tensor) * each

    def chunk(self, pipe: int, chunk: int) -> int:
        """Count what one pass of a micro-batch through a chunk of a stage keeps, scores left out."""
        shape, grid = self.shape, self.mapping.grid
        layers = self.mapping.stages(shape.num_layers).layers_of(pipe, chunk)
        kinds = _kinds(shape, layers)
        found = sum(count * _layer_bytes(self, *kind) for kind, count in kinds)
        is_first = pipe == 0 and chunk == 0
        is_last = pipe == grid.pipe - 1 and chunk == self.mapping.virtual - 1
        found += self._ends(is_first=is_first, is_last=is_last)
        has_mask = not shape.own_blocks and not shape.uses_fused_attention
        if has_mask and grid.tensor * grid.context == 1:
            found += self.mapping.length**2 * self.value_bytes  # stock's causal mask, which layers share
        return found

    def stage(self, pipe: int) -> StageActivations:
        """Count what the passes of a stage keep at once, at most."""
        mapping = self.mapping
        micro_batches = with_dummies(mapping.grid.pipe, mapping.virtual, mapping.micro_batches)
        chunks = [self.chunk(pipe, chunk) for chunk in range(mapping.virtual)]
        if mapping.grid.pipe == 1:
            kept, passes = sum(chunks), 1
        else:
            passes = peak_activations(mapping.grid.pipe, mapping.virtual, micro_batches, pipe)
            few = min(micro_batches, _SCHEDULE_ROUNDS * mapping.grid.pipe)
            counts = _alive(mapping.grid.pipe, mapping.virtual, few, pipe)
            kept = max(sum(n * size for n, size in zip(alive, chunks, strict=True)) for alive in counts)
        again = 0
        if mapping.recompute:
            kinds = _kinds(self.shape, mapping.layers_of(pipe, self.shape.num_layers))
            again = max(self._without_recompute(*kind) for kind, _ in kinds)
        is_last = pipe == mapping.grid.pipe - 1
        return StageActivations(
            kept=kept, passes=passes, logits=self.logits() if is_last else 0, at_work=again
        )

    def _without_recompute(self, is_moe: bool, hidden: int, window: int) -> int:
        plain = replace(self, mapping=replace(self.mapping, recompute=frozenset()))
        return _layer_bytes(plain, is_moe, hidden, window) - _layer_bytes(self, is_moe, hidden, window)


@functools.lru_cache(maxsize=1 << 12)
def _kinds(shape: ModelShape, layers: Sequence[int]) -> tuple[tuple[tuple[bool, int, int], int], ...]:
    """Count the layers of each kind: with experts or without, of which width, and with which window."""
    kinds = Counter((shape.is_moe[each], shape.dense_dim(each), shape.windows[each]) for each in layers)
    return tuple(kinds.items())


@functools.lru_cache(maxsize=256)
def _layer_bytes(activations: Activations, is_moe: bool, hidden: int, window: int) -> int:
    return activations.layer(is_moe=is_moe, hidden=hidden, window=window)


@functools.lru_cache(maxsize=512)
def _alive(pipe: int, virtual: int, micro_batches: int, rank: int) -> frozenset[tuple[int, ...]]:
    """List how many passes of each chunk are under way, after each pass of a rank's schedule."""
    alive, found = [0] * virtual, set()
    for action in actions(pipe, virtual, micro_batches, rank):
        alive[action.chunk] += 1 if action.kind == "F" else -1
        found.add(tuple(alive))
    return frozenset(found)
