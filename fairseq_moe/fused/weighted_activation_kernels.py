"""Apply an activation to tiles of rows, and pass gradients back: the kernels of ``weighted_activation``."""

from fairseq_moe.fused.launch import jit, tl

__all__ = ["activate", "activate_backward"]


@jit
def _inner_activate(
    hidden: tl.tensor, up: tl.tensor, alpha: tl.tensor, limit: tl.tensor, KIND: tl.constexpr
) -> tl.tensor:
    """Compute the activation, its derivative by ``hidden`` and, for gated ones, by ``up``."""
    if KIND == "gelu":
        # cdf and density of the standard normal distribution.
        below = 0.5 * (1.0 + tl.erf(hidden * 0.7071067811865476))
        active = hidden * below
        slope = below + hidden * 0.3989422804014327 * tl.exp(-0.5 * hidden * hidden)
        slope_up = slope
    elif KIND == "relu":
        # Not by a maximum, which makes a number of NaN: whoever looks for overflows must find them.
        active = tl.where(hidden <= 0.0, 0.0, hidden)
        slope = tl.where(hidden <= 0.0, 0.0, 1.0)
        slope_up = slope
    elif KIND == "clamped_swiglu":
        # Not by a maximum either. Beyond a bound the derivative is 0, at it that of the values within, as torch's is.
        gate = tl.where(hidden > limit, limit, hidden)
        raised = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up)) + 1.0
        opened = tl.sigmoid(alpha * gate)
        glu = gate * opened
        active = raised * glu
        slope = tl.where(hidden <= limit, raised * opened * (1.0 + alpha * gate * (1.0 - opened)), 0.0)
        slope_up = tl.where((up >= -limit) & (up <= limit), glu, 0.0)
    else:
        opened = tl.sigmoid(hidden)
        slope_up = hidden * opened
        active = slope_up * up
        slope = up * opened * (1.0 + hidden * (1.0 - opened))
    return active, slope, slope_up


@jit
def _inner_load(
    source: tl.tensor, at: tl.tensor, width: tl.tensor, inside: tl.tensor, IS_GATED: tl.constexpr
) -> tl.tensor:
    """Load what the activation is of and, for gated ones, what it is multiplied by; else the same again."""
    values = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    up = values
    if IS_GATED:
        up = tl.load(source + at + width, mask=inside, other=0.0).to(tl.float32)
    return values, up


@jit
def activate(
    hidden: tl.tensor,
    bias: tl.tensor,
    expert_of: tl.tensor,
    weights: tl.tensor,
    num_rows: tl.tensor,
    active: tl.tensor,
    total: tl.tensor,
    width: tl.tensor,
    alpha: tl.tensor,
    limit: tl.tensor,
    KIND: tl.constexpr,
    IS_GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    IS_COUNTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
) -> None:
    """Write w act(h + b) of a tile; see ``weighted_activation``."""
    hidden_width = width * 2 if IS_GATED else width
    last = tl.load(num_rows).to(tl.int32) if IS_COUNTED else total
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (row < last)[:, None] & (column < width)[None, :]
    long_row = row.to(tl.int64)[:, None]
    at = long_row * hidden_width + column[None, :]
    values, up = _inner_load(hidden, at, width, inside, IS_GATED)
    if HAS_BIAS:
        expert = tl.load(expert_of + row, mask=row < last, other=0).to(tl.int64)[:, None]
        bias_values, bias_up = _inner_load(
            bias, expert * hidden_width + column[None, :], width, inside, IS_GATED
        )
        values += bias_values
        up += bias_up
    result, _slope, _slope_up = _inner_activate(values, up, alpha, limit, KIND)
    if HAS_WEIGHTS:
        result *= tl.load(weights + row, mask=row < last, other=0.0).to(tl.float32)[:, None]
    tl.store(active + long_row * width + column[None, :], result.to(active.dtype.element_ty), mask=inside)


@jit
def activate_backward(
    grad: tl.tensor,
    hidden: tl.tensor,
    bias: tl.tensor,
    expert_of: tl.tensor,
    weights: tl.tensor,
    num_rows: tl.tensor,
    active: tl.tensor,
    grad_hidden: tl.tensor,
    grad_weights: tl.tensor,
    total: tl.tensor,
    width: tl.tensor,
    alpha: tl.tensor,
    limit: tl.tensor,
    KIND: tl.constexpr,
    IS_GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    IS_COUNTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_F: tl.constexpr,
) -> None:
    """Write values again and gradients of whole rows; see ``weighted_activation_backward``."""
    hidden_width = width * 2 if IS_GATED else width
    last = tl.load(num_rows).to(tl.int32) if IS_COUNTED else total
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    long_row = row.to(tl.int64)[:, None]
    weight = tl.full((ROWS, 1), 1.0, tl.float32)
    if HAS_WEIGHTS:
        weight = tl.load(weights + row, mask=row < last, other=0.0).to(tl.float32)[:, None]
    expert = tl.zeros((ROWS, 1), tl.int64)
    if HAS_BIAS:
        expert = tl.load(expert_of + row, mask=row < last, other=0).to(tl.int64)[:, None]
    products = tl.zeros((ROWS, BLOCK_F), tl.float32)
    for block in range(BLOCKS):
        column = block * BLOCK_F + tl.arange(0, BLOCK_F)
        inside = (row < last)[:, None] & (column < width)[None, :]
        at = long_row * hidden_width + column[None, :]
        values, up = _inner_load(hidden, at, width, inside, IS_GATED)
        if HAS_BIAS:
            bias_at = expert * hidden_width + column[None, :]
            bias_values, bias_up = _inner_load(bias, bias_at, width, inside, IS_GATED)
            values += bias_values
            up += bias_up
        result, slope, slope_up = _inner_activate(values, up, alpha, limit, KIND)
        narrow_at = long_row * width + column[None, :]
        upper = tl.load(grad + narrow_at, mask=inside, other=0.0).to(tl.float32)
        products += upper * result
        tl.store(active + narrow_at, (result * weight).to(active.dtype.element_ty), mask=inside)
        upper *= weight
        tl.store(grad_hidden + at, (upper * slope).to(grad_hidden.dtype.element_ty), mask=inside)
        if IS_GATED:
            tl.store(
                grad_hidden + at + width, (upper * slope_up).to(grad_hidden.dtype.element_ty), mask=inside
            )
    if HAS_WEIGHTS:
        # Rows that are nobody's were read as zeros.
        sums = tl.sum(products, axis=1)
        tl.store(grad_weights + row, sums.to(grad_weights.dtype.element_ty), mask=row < total)
