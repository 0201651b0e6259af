"""Tensors that old releases of transformers saved beside the weights, though they follow from config.json."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from fairseq_moe.convert.spec import ModelSpec
from fairseq_moe.modules.blocks.rope import RotaryConfig, frequencies

__all__ = ["are_other_frequencies", "is_leftover", "is_leftover_name"]

_NAME = re.compile(
    r"model\.(?:layers\.(?P<layer>[0-9]{1,6})\.(?:self_)?attn\.)?"
    r"(?:rotary_emb\.(?P<rotary>inv_freq|cos_cached|sin_cached)|masked_bias|bias)"
)
_FLOAT32_ERROR = 8 * torch.finfo(torch.float32).eps  # of a frequency: powers differ in the last digits
_MASKED = -1e4  # what was put in place of a masked score, or something below


def is_leftover_name(name: str, *, num_layers: int | None = None) -> bool:
    """Tell whether a tensor of this name is no weight of a model with so many layers, but an old release's buffer.

    Args:
        name: Hugging Face's.
        num_layers: prediction blocks included; None: any number.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        return False
    if found["layer"] is None:
        return found["rotary"] is not None
    return num_layers is None or int(found["layer"]) < num_layers


def is_leftover(name: str, tensor: Tensor, spec: ModelSpec) -> bool:
    """Tell whether a tensor that ``is_leftover_name`` knows holds what the model implies, rounded to its dtype.

    Frequencies may be those before YaRN stretches them, from which some implementations begin.
    """
    kind = name.rpartition(".")[2]
    if kind == "masked_bias":
        return tensor.numel() == 1 and bool(tensor.double() <= _MASKED)
    if kind == "bias":
        size = tensor.shape[-1] if tensor.dim() else 0
        is_square = tensor.dim() >= 2 and tensor.shape[-2] == size and tensor.numel() == size**2
        return is_square and torch.equal(tensor.float().reshape(size, size), torch.ones(size, size).tril())
    dim, yarn = _turned_dim(spec), spec.rope.yarn
    implied_f = frequencies(RotaryConfig(theta=spec.rope.theta, yarn=yarn), dim).double()
    if kind == "inv_freq":
        plain_f = frequencies(RotaryConfig(theta=spec.rope.theta), dim).double()
        return any(_is_rounded(tensor, each, error=_FLOAT32_ERROR * each) for each in (implied_f, plain_f))
    if tensor.dim() < 2 or tensor.shape[-1] != dim or tensor.numel() != tensor.shape[-2] * dim:
        return False
    function: Callable[[Tensor], Tensor] = torch.cos if kind == "cos_cached" else torch.sin
    magnitude = 1.0 if yarn is None else yarn.magnitude()
    positions_P1 = torch.arange(tensor.shape[-2], dtype=torch.float64).unsqueeze(-1)
    angles_Pd = (positions_P1 * implied_f).repeat(1, 2)
    error_Pd = magnitude * _FLOAT32_ERROR * (1 + angles_Pd)
    return _is_rounded(tensor.reshape(angles_Pd.shape), magnitude * function(angles_Pd), error=error_Pd)


def are_other_frequencies(name: str, tensor: Tensor, spec: ModelSpec) -> bool:
    """Tell whether these are rotary frequencies, finite and as many as the model has, of whatever value.

    transformers computes frequencies from config.json and reads none, so the model is the same without them.
    """
    dim = _turned_dim(spec)
    is_frequencies = name.endswith("inv_freq") and tensor.is_floating_point() and tensor.shape == (dim // 2,)
    return is_frequencies and bool(tensor.isfinite().all())


def _turned_dim(spec: ModelSpec) -> int:
    """Count the values of a head that turn with its position."""
    if spec.mla is not None:
        return spec.mla.qk_rope_head_dim
    return int(spec.head_dim * spec.rope.fraction)


def _is_rounded(tensor: Tensor, implied: Tensor, *, error: Tensor) -> bool:
    """Tell whether ``tensor`` is ``implied`` rounded to its dtype, where that was known within ``error``."""
    if tensor.shape != implied.shape or not tensor.is_floating_point():
        return False
    limits = torch.finfo(tensor.dtype)
    rounding = limits.eps / 2 * implied.abs() + limits.smallest_normal * limits.eps / 2
    return bool(((tensor.double() - implied).abs() <= rounding + error).all())
