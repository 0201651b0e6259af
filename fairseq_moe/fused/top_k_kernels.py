"""Choose experts by logits, and pass gradients back to logits: the kernels of ``top_k``.

A program holds the scores of a few tokens in registers and takes their best experts from there.
Experts are compared by a whole number that grows with the score, and among equal scores falls with the expert's id, so
one maximum finds score and id; a chosen expert's number becomes the least of all.
"""

from fairseq_moe.fused.launch import jit, tl

__all__ = ["choose_experts", "pass_back_to_logits"]


@jit
def _inner_scores(logits: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """Score experts: (gates, raw scores, their largest logit, the sum of their raw scores)."""
    top = tl.max(logits, axis=1)
    if KIND == "sigmoid":
        raw = 1.0 / (1.0 + tl.exp(-logits))
        total = tl.sum(raw, axis=1) + 1e-20
    else:
        raw = tl.exp(logits - top[:, None])
        total = tl.sum(raw, axis=1)
    return raw / total[:, None], raw, top, total


@jit
def _inner_weights(
    logits: tl.tensor,
    is_choice: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    KIND: tl.constexpr,
    TOP_K: tl.constexpr,
) -> tl.tensor:
    """Weigh choices by their logits, without the scale: (weights, the sum that raw scores were divided by)."""
    if KIND == "chosen":
        logits = tl.where(is_choice, logits, float("-inf"))
        raw = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        divisor = tl.sum(raw, axis=1)
    elif KIND == "softmax":
        raw = tl.exp(logits - top[:, None])
        divisor = total
    else:
        raw = 1.0 / (1.0 + tl.exp(-logits))
        if TOP_K == 1:
            divisor = tl.full(top.shape, 1.0, tl.float32)
        else:
            divisor = tl.sum(tl.where(is_choice, raw, 0.0), axis=1) + 1e-20
    return tl.where(is_choice, raw / divisor[:, None], 0.0), divisor


@jit
def _inner_entropy(gates: tl.tensor) -> tl.tensor:
    """Compute each token's entropy in nats; the bounds are float32's eps and 1 - eps."""
    logarithms = tl.log(tl.minimum(tl.maximum(gates, 1.1920929e-07), 0.9999998807907104))
    return -tl.sum(gates * logarithms, axis=1)


@jit
def _inner_ranks(
    scores: tl.tensor,
    bias: tl.tensor,
    expert: tl.tensor,
    num_experts: tl.tensor,
    HAS_BIAS: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> tl.tensor:
    """Make of each score, with its bias, an int64 that orders as they do, the lower id first, NaN as the largest."""
    if HAS_BIAS:
        scores += tl.load(bias + expert, mask=expert < num_experts, other=0.0).to(tl.float32)[None, :]
    scores = tl.where(scores == 0.0, 0.0, scores)  # -0 is equal to 0
    bits = scores.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(scores == scores, order, 0x7FFFFFFF)
    ranks = order.to(tl.int64) * BLOCK_E + (BLOCK_E - 1 - expert)[None, :]
    return tl.where((expert < num_experts)[None, :], ranks, -0x7FFFFFFFFFFFFFFF)


@jit
def _inner_choose(
    ranks: tl.tensor, choice: tl.tensor, TOP_K: tl.constexpr, BLOCK_E: tl.constexpr
) -> tl.tensor:
    """Take the best experts of each token one by one: (their ids, the ranks, the least possible for the chosen)."""
    ids = tl.full((ranks.shape[0], choice.shape[0]), -1, tl.int64)
    for k in range(TOP_K):
        best = tl.max(ranks, axis=1)
        ids = tl.where(choice[None, :] == k, (BLOCK_E - 1 - (best & (BLOCK_E - 1)))[:, None], ids)
        ranks = tl.where(ranks == best[:, None], -0x7FFFFFFFFFFFFFFF, ranks)
    return ids, ranks


@jit
def _inner_counts(
    ids: tl.tensor,
    ranks: tl.tensor,
    of_token: tl.tensor,
    choice: tl.tensor,
    expert: tl.tensor,
    num_experts: tl.tensor,
) -> tl.tensor:
    """Count all, first and second choices of some tokens by expert."""
    of_token = of_token[:, None]
    is_any = (ranks == -0x7FFFFFFFFFFFFFFF) & (expert < num_experts)[None, :]
    # Where there is no second choice, its id is none.
    id_0 = tl.sum(tl.where(choice[None, :] == 0, ids, 0), axis=1)[:, None]
    id_1 = tl.sum(tl.where(choice[None, :] == 1, ids + 1, 0), axis=1)[:, None] - 1
    return (
        tl.sum((is_any & of_token).to(tl.int32), axis=0),
        tl.sum(((expert[None, :] == id_0) & of_token).to(tl.int32), axis=0),
        tl.sum(((expert[None, :] == id_1) & of_token).to(tl.int32), axis=0),
    )


@jit
def _inner_add(
    histogram: tl.tensor,
    fate: tl.tensor,
    counts: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    expert: tl.tensor,
    num_experts: tl.tensor,
) -> None:
    """Add counts to the histogram's lines of a fate. Sums of whole numbers are the same in any order."""
    here = histogram + fate * num_experts + expert
    inside = expert < num_experts
    later = counts - first - second
    tl.atomic_add(here, first.to(tl.int64), mask=inside & (first > 0), sem="relaxed")
    tl.atomic_add(here + 4 * num_experts, second.to(tl.int64), mask=inside & (second > 0), sem="relaxed")
    tl.atomic_add(here + 8 * num_experts, later.to(tl.int64), mask=inside & (later > 0), sem="relaxed")


@jit
def choose_experts(
    logits: tl.tensor,
    bias: tl.tensor,
    padding: tl.tensor,
    ids_of: tl.tensor,
    weights_of: tl.tensor,
    gates_of: tl.tensor,
    entropy_of: tl.tensor,
    histogram: tl.tensor,
    num_tokens: tl.tensor,
    num_experts: tl.tensor,
    scale: tl.tensor,
    KIND: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    CHOOSES: tl.constexpr,
    BY_GATES: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Choose and weigh experts of tokens; without CHOOSES their ids are read, and nothing is counted."""
    expert, choice = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    real = (expert < num_experts)[None, :]
    zero = tl.zeros((BLOCK_E,), tl.int32)
    kept, kept_0, kept_1, left, left_0, left_1 = zero, zero, zero, zero, zero, zero
    for tile in range(TILES):
        token = (tl.program_id(0) * TILES + tile) * BLOCK_T + tl.arange(0, BLOCK_T)
        is_token = token < num_tokens
        token = token.to(tl.int64)
        at_expert = token[:, None] * num_experts + expert[None, :]
        at_choice = token[:, None] * TOP_K + choice[None, :]
        is_choice = is_token[:, None] & (choice < TOP_K)[None, :]
        x = tl.load(logits + at_expert, mask=is_token[:, None] & real, other=0.0)
        x = tl.where(real, x.to(tl.float32), float("-inf"))
        gates, raw, top, total = _inner_scores(x, KIND)
        tl.store(gates_of + at_expert, gates, mask=is_token[:, None] & real)
        is_kept = is_token
        if HAS_PADDING:
            is_kept = tl.load(padding + token, mask=is_token, other=1) == 0
        tl.store(entropy_of + token, tl.where(is_kept, _inner_entropy(gates), 0.0), mask=is_token)
        if CHOOSES:
            compared = x if KIND == "chosen" else raw
            if BY_GATES:
                compared = gates
            ranks = _inner_ranks(compared, bias, expert, num_experts, HAS_BIAS, BLOCK_E)
            ids, ranks = _inner_choose(ranks, choice, TOP_K, BLOCK_E)
            tl.store(ids_of + at_choice, ids, mask=is_choice)
            more, more_0, more_1 = _inner_counts(ids, ranks, is_kept, choice, expert, num_experts)
            kept, kept_0, kept_1 = kept + more, kept_0 + more_0, kept_1 + more_1
            if HAS_PADDING:
                is_left = is_token & (is_kept == 0)
                more, more_0, more_1 = _inner_counts(ids, ranks, is_left, choice, expert, num_experts)
                left, left_0, left_1 = left + more, left_0 + more_0, left_1 + more_1
        else:
            ids = tl.load(ids_of + at_choice, mask=is_choice, other=0)
        chosen = tl.load(logits + token[:, None] * num_experts + ids, mask=is_choice, other=0.0).to(
            tl.float32
        )
        weights, _ = _inner_weights(chosen, (choice < TOP_K)[None, :], top, total, KIND, TOP_K)
        weights = tl.where(is_kept[:, None], weights * scale, 0.0)
        tl.store(weights_of + at_choice, weights.to(weights_of.dtype.element_ty), mask=is_choice)
    if CHOOSES:
        _inner_add(histogram, 0, kept, kept_0, kept_1, expert, num_experts)
        if HAS_PADDING:
            _inner_add(histogram, 3, left, left_0, left_1, expert, num_experts)


@jit
def pass_back_to_logits(
    logits: tl.tensor,
    padding: tl.tensor,
    ids_of: tl.tensor,
    grad_weights: tl.tensor,
    grad_gates: tl.tensor,
    grad_logits: tl.tensor,
    num_tokens: tl.tensor,
    num_experts: tl.tensor,
    scale: tl.tensor,
    KIND: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_GATES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Pass gradients of weights and gates back to the logits, whose scores are computed again."""
    expert, choice = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    start = token.to(tl.int64)[:, None]
    inside, real = (token < num_tokens)[:, None], (expert < num_experts)[None, :]
    x = tl.load(logits + start * num_experts + expert[None, :], mask=inside & real, other=0.0)
    x = tl.where(real, x.to(tl.float32), float("-inf"))
    gates, raw, top, total = _inner_scores(x, KIND)
    by_score = tl.zeros(
        (BLOCK_T, BLOCK_E), tl.float32
    )  # of gates ("softmax"), raw scores or, at last, logits
    if HAS_WEIGHTS:
        is_choice = inside & (choice < TOP_K)[None, :]
        ids = tl.load(ids_of + start * TOP_K + choice[None, :], mask=is_choice, other=0)
        chosen = tl.load(logits + start * num_experts + ids, mask=is_choice, other=0.0).to(tl.float32)
        weights, divisor = _inner_weights(chosen, (choice < TOP_K)[None, :], top, total, KIND, TOP_K)
        upper = tl.load(grad_weights + start * TOP_K + choice[None, :], mask=is_choice, other=0.0)
        upper = upper.to(tl.float32) * scale
        if HAS_PADDING:
            is_kept = tl.load(padding + token, mask=token < num_tokens, other=1) == 0
            upper = tl.where(is_kept[:, None], upper, 0.0)
        if KIND == "chosen":
            upper = weights * (upper - tl.sum(upper * weights, axis=1)[:, None])
        if KIND == "sigmoid" and TOP_K > 1:
            upper = (upper - tl.sum(upper * weights, axis=1)[:, None]) / divisor[:, None]
        for k in range(TOP_K):
            is_k = choice[None, :] == k
            id_k = tl.sum(tl.where(is_k, ids, 0), axis=1)
            upper_k = tl.sum(tl.where(is_k, upper, 0.0), axis=1)
            by_score += tl.where(expert[None, :] == id_k[:, None], upper_k[:, None], 0.0)
    if HAS_GATES:
        of_gates = tl.load(grad_gates + start * num_experts + expert[None, :], mask=inside & real, other=0.0)
        of_gates = of_gates.to(tl.float32)
    else:
        of_gates = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if KIND == "softmax":
        of_gates += by_score
    of_gates -= tl.sum(of_gates * gates, axis=1)[:, None]
    if KIND == "chosen":
        grad = by_score + gates * of_gates
    elif KIND == "softmax":
        grad = gates * of_gates
    else:
        grad = (by_score + of_gates / total[:, None]) * raw * (1.0 - raw)
    tl.store(
        grad_logits + start * num_experts + expert[None, :],
        grad.to(grad_logits.dtype.element_ty),
        mask=inside & real,
    )
