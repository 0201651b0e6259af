"""Balance by Sinkhorn's algorithm (S-BASE, arXiv 2202.01169): an optimal-transport plan from tokens to experts.

A token's logits are shifted by their maximum first, which leaves the plan as it is and exp() in range. Iterations stop
when the factors of the experts move by less than 1e-4 on average, and after 20 at the latest. Stopped iterations are
masked rather than left out, so nothing waits for the device.

An iteration in plain torch is fifteen launches that each take next to nothing; here it is two. The first reads the
logits, and computes each token's factor and its share of the experts' sums; the second adds the shares up, always in
the same order, and moves the experts' factors. How much faster that is on a GPU has not been measured.
"""

import torch
from torch import Tensor

from fairseq_moe.fused.launch import block_of, cdiv, jit, runs_triton, tl

__all__ = ["sinkhorn_plan", "sinkhorn_plan_slowly"]

_EPS = 1e-8  # the kernels have it as a literal
_TOLERANCE = 1e-4
_MAX_ITERATIONS = 20
_MOST_EXPERTS = 1024  # a token's logits stand in registers
_TILE = 1024  # a guess, as the next two
_MOST_PROGRAMS = 256
_ROWS = 16


@torch.no_grad()
def sinkhorn_plan(logits_TE: Tensor, *, padding_T: Tensor | None = None) -> Tensor:
    """Scale exp(logits) until each expert's entries sum to 1/E and each token's to about 1/T.

    Args:
        logits_TE: float router logits of this rank's tokens.
        padding_T: bool, True where a token is padding: its entries are 0, and T counts the others.

    Returns:
        float32 (T, E), or float64 for float64 logits.
    """
    num_tokens, num_experts = logits_TE.shape
    if not runs_triton(logits_TE) or num_experts > _MOST_EXPERTS:
        return sinkhorn_plan_slowly(logits_TE, padding_T=padding_T)
    logits_TE = logits_TE.contiguous()
    plan_TE = torch.empty_like(logits_TE, dtype=torch.float32)
    if num_tokens == 0:
        return plan_TE
    mask_T, valid = None, None
    if padding_T is not None:
        mask_T = padding_T.contiguous().view(torch.uint8)
        valid = (~padding_T).sum().clamp(min=1)
    block_e = max(block_of(num_experts, most=_MOST_EXPERTS), 16)
    block_t, tiles = max(_TILE // block_e, 1), 1
    while cdiv(num_tokens, block_t * tiles) > _MOST_PROGRAMS:
        tiles *= 2
    programs = cdiv(num_tokens, block_t * tiles)
    steps = cdiv(block_of(programs, most=_MOST_PROGRAMS), _ROWS)
    # The experts' factors before the last iteration and after it, and whether they are moving.
    factors_2E = torch.ones(2, num_experts, device=logits_TE.device)
    moving = torch.ones(1, dtype=torch.int32, device=logits_TE.device)
    sums = factors_2E.new_empty(programs, num_experts)
    given = (logits_TE, mask_T, valid, factors_2E)
    blocks = {"HAS_PADDING": mask_T is not None, "BLOCK_T": block_t, "BLOCK_E": block_e}
    for _ in range(_MAX_ITERATIONS):
        _sum_experts[(programs,)](*given, moving, sums, num_tokens, num_experts, TILES=tiles, **blocks)
        _move_factors[(1,)](
            sums, factors_2E, moving, programs, num_experts, _TOLERANCE,
            TILES=steps, ROWS=_ROWS, BLOCK_E=block_e,
        )  # fmt: skip
    _write_plan[(cdiv(num_tokens, block_t),)](*given, plan_TE, num_tokens, num_experts, **blocks)
    return plan_TE


@jit
def _inner_cost(
    logits: tl.tensor,
    padding: tl.tensor,
    token: tl.tensor,
    num_tokens: tl.tensor,
    expert: tl.tensor,
    num_experts: tl.tensor,
    HAS_PADDING: tl.constexpr,
) -> tl.tensor:
    """Compute exp(logits - their maximum) of tokens, 0 for padding and outside."""
    is_token, real = token < num_tokens, (expert < num_experts)[None, :]
    at = token.to(tl.int64)[:, None] * num_experts + expert[None, :]
    x = tl.load(logits + at, mask=is_token[:, None] & real, other=0.0)
    x = tl.where(real, x.to(tl.float32), float("-inf"))
    cost = tl.exp(x - tl.max(x, axis=1)[:, None])
    if HAS_PADDING:
        is_token = tl.load(padding + token, mask=is_token, other=1) == 0
    return tl.where(is_token[:, None], cost, 0.0)


@jit
def _inner_token_factor(
    cost: tl.tensor, factor: tl.tensor, valid: tl.tensor, num_tokens: tl.tensor, HAS_PADDING: tl.constexpr
) -> tl.tensor:
    """Compute each token's factor by those of the experts."""
    count = num_tokens * 1.0  # Triton makes an argument that is 1 a constant, which has no dtype
    if HAS_PADDING:
        count = tl.load(valid) * 1.0
    return 1.0 / (count * (tl.sum(cost * factor[None, :], axis=1) + 1e-8))


@jit
def _sum_experts(
    logits: tl.tensor,
    padding: tl.tensor,
    valid: tl.tensor,
    factors: tl.tensor,
    moving: tl.tensor,
    sums: tl.tensor,
    num_tokens: tl.tensor,
    num_experts: tl.tensor,
    HAS_PADDING: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    expert = tl.arange(0, BLOCK_E)
    factor = tl.load(factors + num_experts + expert, mask=expert < num_experts, other=0.0)
    # Where nothing moves any more, no logits are read.
    end = tl.where(tl.load(moving) != 0, num_tokens, 0)
    total = tl.zeros((BLOCK_E,), tl.float32)
    for tile in range(TILES):
        token = (tl.program_id(0) * TILES + tile) * BLOCK_T + tl.arange(0, BLOCK_T)
        cost = _inner_cost(logits, padding, token, end, expert, num_experts, HAS_PADDING)
        of_token = _inner_token_factor(cost, factor, valid, num_tokens, HAS_PADDING)
        total += tl.sum(cost * of_token[:, None], axis=0)
    tl.store(sums + tl.program_id(0) * num_experts + expert, total, mask=expert < num_experts)


@jit
def _move_factors(
    sums: tl.tensor,
    factors: tl.tensor,
    moving: tl.tensor,
    programs: tl.tensor,
    num_experts: tl.tensor,
    tolerance: tl.tensor,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    expert = tl.arange(0, BLOCK_E)
    real = expert < num_experts
    total = tl.zeros((BLOCK_E,), tl.float32)
    for tile in range(TILES):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < programs)[:, None] & real[None, :]
        total += tl.sum(
            tl.load(sums + row[:, None] * num_experts + expert[None, :], mask=inside, other=0.0), axis=0
        )
    before = tl.load(factors + expert, mask=real, other=0.0)
    now = tl.load(factors + num_experts + expert, mask=real, other=0.0)
    new = tl.where(real, 1.0 / (num_experts * (total + 1e-8)), 0.0)
    moved = tl.sum(tl.abs(new - now)) / num_experts
    is_moving = tl.load(moving)
    tl.store(factors + expert, tl.where(is_moving != 0, now, before), mask=real)
    tl.store(factors + num_experts + expert, tl.where(is_moving != 0, new, now), mask=real)
    tl.store(moving, tl.where(moved > tolerance, is_moving, 0))


@jit
def _write_plan(
    logits: tl.tensor,
    padding: tl.tensor,
    valid: tl.tensor,
    factors: tl.tensor,
    plan: tl.tensor,
    num_tokens: tl.tensor,
    num_experts: tl.tensor,
    HAS_PADDING: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    expert = tl.arange(0, BLOCK_E)
    real = expert < num_experts
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    cost = _inner_cost(logits, padding, token, num_tokens, expert, num_experts, HAS_PADDING)
    before = tl.load(factors + expert, mask=real, other=0.0)
    now = tl.load(factors + num_experts + expert, mask=real, other=0.0)
    of_token = _inner_token_factor(cost, before, valid, num_tokens, HAS_PADDING)
    at = token.to(tl.int64)[:, None] * num_experts + expert[None, :]
    tl.store(
        plan + at, of_token[:, None] * cost * now[None, :], mask=(token < num_tokens)[:, None] & real[None, :]
    )


def sinkhorn_plan_slowly(logits_TE: Tensor, *, padding_T: Tensor | None = None) -> Tensor:
    """Compute ``sinkhorn_plan`` in plain torch."""
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    num_experts = logits_TE.shape[1]
    num_tokens = logits_TE.new_full((), len(logits_TE))
    cost_TE = torch.exp(logits_TE - logits_TE.amax(-1, keepdim=True))
    if padding_T is not None:
        cost_TE = cost_TE.masked_fill(padding_T.unsqueeze(-1), 0.0)
        num_tokens = (~padding_T).sum().clamp(min=1).to(logits_TE.dtype)
    token_scale_T = cost_TE.new_ones(len(cost_TE))
    expert_scale_E = cost_TE.new_ones(num_experts)
    moving = torch.ones((), dtype=torch.bool, device=logits_TE.device)
    with torch.autocast(cost_TE.device.type, enabled=False):  # which would round the products
        for _ in range(_MAX_ITERATIONS):
            new_token_scale_T = 1 / (num_tokens * (cost_TE @ expert_scale_E + _EPS))
            new_expert_scale_E = 1 / (num_experts * (new_token_scale_T @ cost_TE + _EPS))
            moved = (new_expert_scale_E - expert_scale_E).abs().mean()
            token_scale_T = torch.where(moving, new_token_scale_T, token_scale_T)
            expert_scale_E = torch.where(moving, new_expert_scale_E, expert_scale_E)
            moving = moving & (moved > _TOLERANCE)
    return token_scale_T.unsqueeze(-1) * cost_TE * expert_scale_E
