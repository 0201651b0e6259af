"""Stock's optimizers: float32 copies of parameters, --fp16-adam-stats without NVIDIA apex, Adam's step."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fairseq.optim import FairseqOptimizer
from fairseq.optim.fused_adam import FusedAdamV1, get_fused_adam_class
from torch import Tensor

from fairseq_moe.optim import HalfAdam
from fairseq_moe.optim.blocked_adam import can_step_in_blocks, step_in_blocks
from fairseq_moe.optim.noted_factor import NotedFactor
from fairseq_moe.optim.one_pass_adam import OnePassAdam, step_in_one_pass
from fairseq_moe.stock.find_experts import moe_decoder
from fairseq_moe.stock.run import split_mesh
from fairseq_moe.stock.seam import seam

__all__ = ["float32_copies"]


def float32_copies(optimizer: FairseqOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Pair each float32 parameter that a half-precision optimizer steps with the model's own; else nothing.

    With flat gradients stock keeps all copies in one tensor; models with experts refuse that.
    """
    copies = getattr(optimizer, "fp32_params", None)
    if copies is not None and not isinstance(copies, (Tensor, dict)):
        yield from zip(copies, optimizer.fp16_params, strict=True)


def _noted_factor(optimizer: Any) -> NotedFactor | None:
    """Find the torch optimizer within stock's that applies a factor of the gradients by itself; None: there is none."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if isinstance(inner, NotedFactor) and inner.applies_factor else None


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


@seam(
    "fairseq.trainer:Trainer._build_optimizer",
    signature="(self)",
    stock_does="steps Adam on a GPU in nine passes over every parameter, and converts half-precision ones twice",
    breaks="with many experts, which are most parameters and get few rows each, the step is a third of an update",
    we_do="one kernel for each parameter of a model with experts, equal within one rounding of the stored dtype; with "
    "tensor or context ranks, as many updates before --fp16 raises its loss scale as with the data ranks alone",
    test="tests/unit/stock/test_one_pass_adam.py",
)
def build_optimizer(stock: Callable[..., Any], self: Any) -> None:
    with _scale_window_of_data_ranks(self):
        stock(self)
    if moe_decoder(self.model) is not None:
        step_in_one_pass(getattr(self._optimizer, "optimizer", None), dict(float32_copies(self._optimizer)))


@contextmanager
def _scale_window_of_data_ranks(trainer: Any) -> Iterator[None]:
    """Let stock, which divides 2**14 updates by the number of all ranks, divide them by that of data ranks."""
    common, mesh = trainer.cfg.common, split_mesh(trainer)
    if mesh is None or common.fp16_scale_window is not None or len(trainer.cfg.optimization.update_freq) > 1:
        yield
        return
    common.fp16_scale_window = int(2**14 / mesh.ranks.data / trainer.cfg.optimization.update_freq[0])
    try:
        yield
    finally:
        common.fp16_scale_window = None


@seam(
    "fairseq.optim.fairseq_optimizer:FairseqOptimizer.multiply_grads",
    signature="(self, c)",
    stock_does="rewrites every gradient",
    breaks="an update of a model with many experts spends as long on it as on a small step",
    we_do="note the factor where the step applies it as it reads the gradients",
    test="tests/unit/stock/test_one_pass_adam.py",
)
def multiply_grads(stock: Callable[..., Any], self: Any, c: Any) -> None:
    noted = _noted_factor(self)
    if noted is None:
        stock(self, c)
    else:
        noted.scale_gradients(c)


@seam(
    "fairseq.optim.fairseq_optimizer:FairseqOptimizer.clip_grad_norm",
    signature="(self, max_norm, aggregate_norm_fn)",
    stock_does="takes the norm of gradients that it has multiplied before, and rewrites them to clip",
    breaks="where the factor is only noted, that is another norm",
    we_do="multiply the norm by what is noted, and note what clips, as stock does in half precision",
    test="tests/unit/stock/test_one_pass_adam.py",
)
def clip_grad_norm(
    stock: Callable[..., Any], self: Any, max_norm: float, aggregate_norm_fn: Any = None
) -> Tensor:
    noted = _noted_factor(self)
    if noted is None or noted.factor is None:
        norm: Tensor = stock(self, max_norm, aggregate_norm_fn)
        return norm
    norm = noted.factor * stock(self, 0, aggregate_norm_fn)
    if max_norm > 0:
        noted.scale_gradients((max_norm / (norm + 1e-6)).clamp_(max=1))
    return norm


@seam(
    "fairseq.optim.fp16_optimizer:_FP16OptimizerMixin._sync_fp16_grads_to_fp32",
    signature="(self)",
    stock_does="copies half-precision gradients to float32 before it takes their norm",
    breaks="with many experts the copy is a pass of its own, and makes two more passes twice as long",
    we_do="lend the gradients as they are to a step whose kernel converts them as it reads",
    test="tests/unit/stock/test_one_pass_adam.py",
)
def sync_gradients(stock: Callable[..., Any], self: Any) -> None:
    if not self._needs_sync or not _takes_half_gradients(self):
        stock(self)
        return
    for copy, p in float32_copies(self):
        if p.requires_grad:
            copy.grad = None
            copy.grad_dtype = p.dtype
            copy.grad = torch.zeros_like(p) if p.grad is None else p.grad
    self._needs_sync = False


def _takes_half_gradients(optimizer: Any) -> bool:
    return not optimizer.has_flat_params and _noted_factor(optimizer) is not None


@seam(
    "fairseq.optim.fp16_optimizer:_FP16OptimizerMixin._sync_fp32_params_to_fp16",
    signature="(self)",
    stock_does="copies float32 parameters back to half precision after the step",
    breaks="with many experts that is a pass of its own",
    we_do="leave it to a step that has written both",
    test="tests/unit/stock/test_one_pass_adam.py",
)
def sync_parameters(stock: Callable[..., Any], self: Any) -> None:
    inner = getattr(self, "optimizer", None)
    if not (isinstance(inner, OnePassAdam) and inner.copies):
        stock(self)


@seam(
    "fairseq.optim.fp16_optimizer:_FP16OptimizerMixin.zero_grad",
    signature="(self)",
    stock_does="under --bf16 keeps the factor of an update that was skipped; zeroes float32 gradients",
    breaks="one gradient that is not finite makes every later norm so, and the run ends; gradients that are only lent "
    "to the float32 copies would be written",
    we_do="begin with a factor of 1, and take lent gradients away",
    test="tests/unit/stock/test_one_pass_adam.py",
)
def zero_gradients(stock: Callable[..., Any], self: Any) -> None:
    if _takes_half_gradients(self):
        for copy, _ in float32_copies(self):
            copy.grad = None
    stock(self)
    if self.scaler is None:
        self._multiply_factor = 1.0
