"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), and YaRN (Peng et al. 2023, 2309.00071).

Pair i of a head turns by position * f_i, f_i = theta^(-2i/d). The *half* form pairs values (i, i + d/2) (Mixtral,
Qwen, OLMoE), the *interleaved* form (2i, 2i + 1) (DeepSeek).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Rotary", "RotaryConfig", "YarnConfig", "rotate"]


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """Stretches rotary positions beyond the original context (YaRN).

    Args:
        factor: new context length over the original one.
        original_max_positions: tokens of the original context.
        beta_fast: pairs that turn more often than this within it keep their frequency.
        beta_slow: pairs that turn less often are slowed down ``factor`` times; in between, part of each.
        mscale: weight of the logarithm that scales cosines and sines; see ``attention_factor``.
        mscale_all_dim: the same for the scores of latent attention.
        attention_factor: multiplies cosines and sines; None: follows from the others.
        truncate: the bounds of the pairs in between are rounded outwards to whole pairs.
    """

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def magnitude(self) -> float:
        """Factor of cosines and sines."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._logarithm(self.mscale) / self._logarithm(self.mscale_all_dim)
        return self._logarithm(1.0)

    def score_scale(self) -> float:
        """Factor of the scores of latent attention."""
        return self._logarithm(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _logarithm(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """Describes how heads turn with the position.

    Args:
        theta: base of the frequencies.
        interleaved: which values are a pair; see the module.
        fraction: share of each head that turns, from its beginning.
        yarn: stretching, if any.
    """

    theta: float = 10_000.0
    interleaved: bool = False
    fraction: float = 1.0
    yarn: YarnConfig | None = None


class Rotary:
    """Turns heads by their positions; no parameters, and no buffers that a conversion of the model would round.

    Args:
        config: how heads turn.
        head_dim: size of a head.
    """

    def __init__(self, config: RotaryConfig, head_dim: int) -> None:
        self.config = config
        self.dim = int(head_dim * config.fraction)
        self._tables: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, *, start: int = 0, spans: tuple[slice, ...] | None = None) -> Tensor:
        """Turn heads by their positions.

        Args:
            x: float (..., S, d), the last S positions of a sequence.
            start: position of the first.
            spans: in place of these, positions in rising order that S counts.

        Returns:
            the same shape and dtype; products are taken in float32 at least.
        """
        spans = spans or (slice(start, start + x.shape[-2]),)
        cos_Sf, sin_Sf = (
            table_Pf[spans[0]] if len(spans) == 1 else torch.cat([table_Pf[span] for span in spans])
            for table_Pf in self._covering(spans[-1].stop, x.device)
        )
        turned = rotate(x[..., : self.dim], cos_Sf, sin_Sf, interleaved=self.config.interleaved)
        return turned if self.dim == x.shape[-1] else torch.cat([turned, x[..., self.dim :]], dim=-1)

    def _covering(self, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        tables = self._tables
        if tables is None or len(tables[0]) < num_positions or tables[0].device != device:
            # Doubled, so that decoding token by token does not compute them for each.
            known = 0 if tables is None else len(tables[0])
            with torch.inference_mode(False):  # or they could never be used in training
                tables = self._compute(max(num_positions, 2 * known), device)
            self._tables = tables
        return tables

    def _compute(self, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        # In float32, as the published models were trained: at large positions angles are that inexact.
        positions_P = torch.arange(num_positions, device=device, dtype=torch.float32)
        angles_Pf = positions_P.unsqueeze(-1) * frequencies(self.config, self.dim, device=device)
        yarn = self.config.yarn
        magnitude = 1.0 if yarn is None else yarn.magnitude()
        return angles_Pf.cos() * magnitude, angles_Pf.sin() * magnitude


def frequencies(config: RotaryConfig, dim: int, *, device: torch.device | None = None) -> Tensor:
    """Compute each pair's radians per position: float32 (dim / 2,)."""
    exponents_f = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
    wavelengths_f = config.theta**exponents_f
    plain_f = 1.0 / wavelengths_f
    if config.yarn is None:
        return plain_f
    share_f = _stretched_share(config.yarn, config.theta, dim).to(plain_f.device)
    return 1.0 / (config.yarn.factor * wavelengths_f) * share_f + plain_f * (1 - share_f)


def _stretched_share(yarn: YarnConfig, theta: float, dim: int) -> Tensor:
    """Compute how much each pair is slowed down, from 0 to 1: float32 (dim / 2,)."""

    def pair_turning(times: float) -> float:
        ratio = yarn.original_max_positions / (2 * math.pi * times)
        return dim * math.log(ratio) / (2 * math.log(theta))

    low, high = pair_turning(yarn.beta_fast), pair_turning(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


def rotate(x: Tensor, cos_Sf: Tensor, sin_Sf: Tensor, *, interleaved: bool) -> Tensor:
    """Turn each pair (a, b) of the last axis into (a cos - b sin, b cos + a sin).

    Args:
        x: float (..., S, d).
        cos_Sf: float (S, d / 2).
        sin_Sf: the same.
        interleaved: pairs are neighbours instead of halves; they stay where they are.
    """
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
    else:
        a, b = x.chunk(2, dim=-1)
    turned = (a * cos_Sf - b * sin_Sf, b * cos_Sf + a * sin_Sf)
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return joined.to(x.dtype)
