"""Statistics of each MoE layer by itself (--moe-per-layer-logging).

Logged names are ``layer<index>_<name>``, with decoder layers from 0. Losses are means over tokens, statistics
means over micro-batches and ranks; violations and drop rates follow from loads summed over all of them, so
they are those of the whole update.
"""

from collections.abc import Iterable
from typing import Any

from fairseq.logging import metrics
from torch import Tensor

from fairseq_moe.modules.routing.contract import LOSSES
from fairseq_moe.modules.routing.stats import LAYER_STATS, load_violations

__all__ = ["log_per_layer", "per_layer_names", "per_layer_sums"]

_PREFIX = "_moe_layer"  # of the summed tensors; the underscore keeps them out of progress bars
_STATS = ("entropy_gating", "expert_bias_spread")
_OF_LOAD = ("max_violation", "min_violation", "drop_rate")


def per_layer_sums(
    auxes: list[Any], stats_L: Tensor, loads_L2E: Tensor, sample_size: Any
) -> dict[str, Tensor]:
    """Collect what the criterion adds to its logging output: three tensors per MoE layer.

    Args:
        auxes: one ``MoEAux`` per decoder layer, None for a dense one.
        stats_L: float (L, len(LAYER_STATS)), of the layers that are not dense.
        loads_L2E: float, requested and kept assignments of their experts.
        sample_size: weight of the losses.
    """
    sums: dict[str, Tensor] = {}
    layers = [index for index, aux in enumerate(auxes) if aux is not None]
    for index, stats, load_2E in zip(layers, stats_L, loads_L2E, strict=True):
        sums[f"{_PREFIX}{index}_losses"] = auxes[index].losses.detach() * sample_size
        sums[f"{_PREFIX}{index}_stats"] = stats
        sums[f"{_PREFIX}{index}_load"] = load_2E
    return sums


def log_per_layer(logging_outputs: list[dict[str, Any]], *, sample_size: Any, batches: Any) -> None:
    """Log the sums of ``per_layer_sums``, if there are any."""
    keys = dict.fromkeys(key for log in logging_outputs for key in log if key.startswith(_PREFIX))
    totals = {key: sum(log[key] for log in logging_outputs if key in log) for key in keys}
    for key in keys:
        layer, what = key.removeprefix("_moe_").rsplit("_", 1)
        if what == "losses":
            for name, value in zip(LOSSES, totals[key] / (sample_size or 1), strict=True):
                metrics.log_scalar(f"{layer}_{name}_loss", value, sample_size, priority=600, round=6)
        elif what == "stats":
            means = dict(zip(LAYER_STATS, totals[key] / (batches or 1), strict=True))
            for name in _STATS:
                metrics.log_scalar(f"{layer}_{name}", means[name], batches, priority=600, round=4)
        else:
            _log_load(layer, totals[key])


def per_layer_names(layers: Iterable[int], num_experts: int) -> list[str]:
    """Name what ``log_per_layer`` logs.

    Args:
        layers: the decoder layers with experts, from 0.
        num_experts: E.
    """
    names = [*(f"{name}_loss" for name in LOSSES), *_STATS, *_OF_LOAD]
    names += [f"load_expert{expert}" for expert in range(num_experts)]
    return [f"layer{layer}_{name}" for layer in layers for name in names]


def _log_load(layer: str, load_2E: Tensor) -> None:
    wanted, kept = load_2E
    maximum, minimum = load_violations(wanted.unsqueeze(0))[0]
    dropped = 100.0 * (wanted.sum() - kept.sum()) / wanted.sum().clamp(min=1)
    for name, value in zip(_OF_LOAD, (maximum, minimum, dropped), strict=True):
        metrics.log_scalar(f"{layer}_{name}", value, priority=600, round=4)
    for expert, share in enumerate(100.0 * wanted / wanted.sum().clamp(min=1)):
        metrics.log_scalar(f"{layer}_load_expert{expert}", share, priority=600, round=3)
