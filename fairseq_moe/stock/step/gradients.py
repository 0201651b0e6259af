"""Gradients of experts: their scale, their replicas, and the norm over all of them.

An expert has already seen the tokens of every rank of its exchange group, so the sum over its replicas is the
whole gradient. Stock divides dense gradients by the world size and later multiplies all gradients by world
size / sample size; experts must take part in that division or they come out world-size times too large.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_moe.distributed import all_reduce_sum
from fairseq_moe.errors import NonFiniteError, RanksDisagreeError
from fairseq_moe.models.decoder import MoEDecoder
from fairseq_moe.parallel.experts import ExpertLayout
from fairseq_moe.parallel.placement import (
    EXPERT,
    gradient_divisor,
    is_expert,
    num_copies,
    place,
    placement_of,
)
from fairseq_moe.stock.find_experts import any_sharded, moe_decoder
from fairseq_moe.stock.optim import float32_copies
from fairseq_moe.stock.run import run_of
from fairseq_moe.stock.seam import seam
from fairseq_moe.stock.step.guard import StepGuard

__all__ = ["GradNorm"]


@seam(
    "fairseq.optim.fairseq_optimizer:FairseqOptimizer.all_reduce_grads",
    signature="(self, module)",
    stock_does="reduces dense gradients and leaves those of parameters marked as experts alone",
    breaks="expert gradients come out world-size times too large, and replicas of an expert drift apart",
    we_do="divide expert gradients by the world size and sum them over the replicas of each expert",
    test="tests/distributed/test_training_equality.py",
)
def all_reduce_grads(stock: Callable[..., Any], self: Any, module: nn.Module) -> None:
    decoder = moe_decoder(module)
    run = run_of(decoder)
    if run is not None:
        run.guard.see_before_sum(_not_summed(module, run.mesh.layout))
    stock(self, module)
    if decoder is not None and decoder.mesh is not None and decoder.mesh.layout.world_size > 1:
        _reduce_expert_grads(module, decoder)


def _not_summed(module: nn.Module, layout: ExpertLayout) -> list[Tensor]:
    """List the parameters whose gradients are this rank's own now and a sum over ranks soon."""
    parameters = list(module.parameters())
    if layout.world_size == 1 or any_sharded(parameters):
        return []
    dense = hasattr(module, "all_reduce_grads")  # legacy_ddp; DistributedDataParallel has summed them already
    experts = num_copies(EXPERT, layout) > 1
    return [p for p in parameters if (experts if is_expert(p) else dense)]


def _reduce_expert_grads(module: nn.Module, decoder: MoEDecoder) -> None:
    assert decoder.mesh is not None
    layout = decoder.mesh.layout
    experts = [p for p in module.parameters() if is_expert(p) and p.requires_grad]
    if not experts:  # frozen, on all ranks
        return
    for p in experts:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    grads = [p.grad for p in experts if p.grad is not None]
    if any_sharded(experts):
        divisor = gradient_divisor(EXPERT, layout, is_averaged=True)
        if decoder.moe.moe_normalize_expert_grad == "sqrt_world_size":
            divisor = math.sqrt(divisor)
        torch._foreach_div_(grads, divisor)
        return
    # Before the sum: half-precision sums stay in range.
    torch._foreach_div_(grads, gradient_divisor(EXPERT, layout, is_averaged=False))
    if num_copies(EXPERT, layout) > 1:
        for grad in grads:
            all_reduce_sum(grad, decoder.mesh.group_of_copies(EXPERT))


@seam(
    "fairseq.trainer:Trainer.clip_grad_norm",
    signature="(self, clip_norm)",
    stock_does="takes the norm over dense gradients only, and sums it over FSDP shards on the GPU only",
    breaks="gnorm and clipping ignore experts; an inf in one rank's expert poisons the weights unseen; "
    "fully sharded CPU runs crash; a norm that is not finite ends the run, after forward passes on some "
    "ranks only",
    we_do="one norm over dense and expert gradients of all ranks, the same number on every rank; when it is "
    "not finite all skip the update, and one names the first bad gradient and its rank",
    test="tests/distributed/test_grad_norm.py",
)
def clip_grad_norm(stock: Callable[..., Any], self: Any, clip_norm: float) -> Tensor:
    run, update = run_of(self), self.get_num_updates()
    if run is None and not (self.is_fsdp and not self.cuda):
        return stock(self, clip_norm)
    guard = None if run is None else run.guard
    num_replicas = 1 if run is None or self.is_fsdp else num_copies(EXPERT, run.mesh.layout)
    for master, parameter in float32_copies(self.optimizer):
        place([master], placement_of(parameter))  # stock has handed on its own mark alone
    aggregate = GradNorm(num_replicas=num_replicas, dense_is_sharded=self.is_fsdp, guard=guard, update=update)
    try:
        norm = self.optimizer.clip_grad_norm(clip_norm, aggregate_norm_fn=aggregate)
    except FloatingPointError as error:
        if guard is None:
            raise
        # --fp16 at its smallest loss scale; stock would run the model again, to find out where.
        raise NonFiniteError(str(error), agreed=True) from error
    if guard is not None:
        guard.skip_if_bad(norm, self.get_model(), update)
    return norm


@seam(
    "fairseq.utils:clip_grad_norm_",
    signature="(params, max_norm, aggregate_norm_fn)",
    stock_does="returns 0 when only experts have gradients, and leaves experts out of the norm",
    breaks="as above",
    we_do="when the trainer hands in a GradNorm, that object computes the norm and clips",
    test="tests/distributed/test_grad_norm.py",
)
def clip_grad_norm_(
    stock: Callable[..., Any], params: Any, max_norm: float, aggregate_norm_fn: Any = None
) -> Tensor:
    if not isinstance(aggregate_norm_fn, GradNorm):
        return stock(params, max_norm, aggregate_norm_fn)
    return aggregate_norm_fn.clip([params] if isinstance(params, Tensor) else list(params), max_norm)


class GradNorm:
    """Take the norm of all gradients of all ranks, with one all-reduce.

    Args:
        num_replicas: ranks that hold the same expert gradients.
        dense_is_sharded: whether each rank holds a shard of the dense gradients, rather than all of them.
        guard: what else the ranks agree on with that all-reduce; None: nothing.
        update: the number of updates that this rank has made.
    """

    def __init__(
        self, *, num_replicas: int, dense_is_sharded: bool, guard: StepGuard | None = None, update: int = 0
    ) -> None:
        self.num_replicas = num_replicas
        self.dense_is_sharded = dense_is_sharded
        self.guard = guard
        self.update = update

    @torch.no_grad()
    def clip(self, params: list[Tensor], max_norm: float) -> Tensor:
        """Scale the gradients so that their norm is at most ``max_norm`` (0: leave them) and return the norm
        before.

        Every rank gets the same number, so that all skip a step with a non-finite gradient together. It is
        NaN when a rank's loss is not finite.

        Raises:
            RanksDisagreeError: ranks that hold copies of the dense gradients disagree about them, or ranks
                are at different updates.
        """
        with_grad = [p for p in params if p.grad is not None]
        dense = [p.grad for p in with_grad if not is_expert(p) and p.grad is not None]
        experts = [p.grad for p in with_grad if is_expert(p) and p.grad is not None]
        device = params[0].device if params else torch.device("cpu")
        dense_sq = _squared_norm(dense, device)
        expert_sq = _squared_norm(experts, device) / self.num_replicas
        total_sq = self._total(dense_sq, expert_sq)
        is_double = any(grad.dtype == torch.float64 for grad in dense + experts)
        norm = total_sq.sqrt().to(torch.float64 if is_double else torch.float32)
        if max_norm > 0:
            torch._foreach_mul_(dense + experts, (max_norm / (norm + 1e-6)).clamp_(max=1))
        return norm

    def _total(self, dense_sq: Tensor, expert_sq: Tensor) -> Tensor:
        # Sums over ranks of: expert part, dense part, its square (to see whether all ranks hold the same).
        own = torch.stack([expert_sq, dense_sq, dense_sq**2, torch.ones_like(dense_sq)])
        if self.guard is not None:
            own = torch.cat([own, self.guard.values(self.update, own.device)])
        sums = all_reduce_sum(own)
        expert_total, dense_total, _, num_ranks = sums[:4].unbind()
        numbers = sums.tolist()  # the one place that waits for the device
        losses_are_finite = True
        if self.guard is not None:
            losses_are_finite = self.guard.judge(numbers[4:], num_ranks=int(numbers[3]), update=self.update)
        if not losses_are_finite:
            return torch.full_like(dense_sq, math.nan)
        if self.dense_is_sharded:
            return expert_total + dense_total
        self._check_copies(*numbers[1:4])
        return expert_total + dense_total / num_ranks

    def _check_copies(self, dense_total: float, dense_square_total: float, num_ranks: float) -> None:
        mean = dense_total / num_ranks
        spread = math.sqrt(max(dense_square_total / num_ranks - mean**2, 0.0)) if math.isfinite(mean) else 0.0
        if spread > 1e-6 * (mean + 1e-12):
            raise RanksDisagreeError(
                f"gradients of the dense parameters differ between ranks (mean {mean:.9g} and spread "
                f"{spread:.9g} of the squared norm over {int(num_ranks)} ranks); look for a rank with other "
                "code, other hardware or its own random numbers.",
                agreed=True,
            )


def _squared_norm(grads: list[Tensor], device: torch.device) -> Tensor:
    """Sum the squares of all elements: a float64 scalar; each tensor's norm is taken in float32 or wider."""
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=device)
    wide = [grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad for grad in grads]
    norms = torch._foreach_norm(wide, 2)
    return torch.stack([norm.double().to(device) for norm in norms]).square().sum()
