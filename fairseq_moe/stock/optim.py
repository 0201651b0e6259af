"""Stock's optimizers: float32 copies of parameters, --fp16-adam-stats without NVIDIA apex, Adam's step on CPU."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from fairseq.optim import FairseqOptimizer
from fairseq.optim.fused_adam import FusedAdamV1, get_fused_adam_class
from torch import Tensor

from fairseq_moe.optim import HalfAdam
from fairseq_moe.optim.blocked_adam import can_step_in_blocks, step_in_blocks
from fairseq_moe.stock.seam import seam

__all__ = ["float32_copies"]


def float32_copies(optimizer: FairseqOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Pair each float32 parameter that a half-precision optimizer steps with the model's own; else nothing.

    With flat gradients stock keeps all copies in one tensor; models with experts refuse that.
    """
    copies = getattr(optimizer, "fp32_params", None)
    if copies is not None and not isinstance(copies, (Tensor, dict)):
        yield from zip(copies, optimizer.fp16_params, strict=True)


@seam(
    "fairseq.optim.adam:FairseqAdam.__init__",
    signature="(self, cfg, params)",
    stock_does="refuses --fp16-adam-stats unless an old CUDA extension of apex is there",
    breaks="the branch's commands need that extension, which current apex no longer builds by default",
    we_do="use our own Adam with half-precision state where stock refuses, and apex where stock uses it",
    test="tests/unit/optim/test_half_adam.py",
)
def adam_init(stock: Callable[..., Any], self: Any, cfg: Any, params: Iterable[Any]) -> None:
    if not cfg.fp16_adam_stats or getattr(cfg, "tpu", False) or _stock_uses_apex(cfg):
        stock(self, cfg, params)
        return
    FairseqOptimizer.__init__(self, cfg)
    self._optimizer = HalfAdam(params, **self.optimizer_config)


def _stock_uses_apex(cfg: Any) -> bool:
    return (
        not getattr(cfg, "use_old_adam", False)
        and torch.cuda.is_available()
        and get_fused_adam_class() is FusedAdamV1
    )


@seam(
    "fairseq.optim.adam:Adam.step",
    signature="(self, closure)",
    stock_does="makes nine passes over every parameter",
    breaks="with many experts, memory traffic of the step takes up to a tenth of an update on CPU",
    we_do="the same operations block by block on CPU, equal to the bit",
    test="tests/unit/optim/test_blocked_adam.py",
)
def adam_step(stock: Callable[..., Any], self: Any, closure: Any = None) -> Any:
    if not can_step_in_blocks(self):
        return stock(self, closure)
    loss = None if closure is None else closure()
    step_in_blocks(self)
    return loss
