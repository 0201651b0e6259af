"""Gradients of all ranks: their scale, their sums over copies, and the norm over all of them.

An expert has already seen the tokens of every rank of its exchange group, so the sum over its replicas is the
whole gradient. Stock divides dense gradients by the number of data ranks and later multiplies all gradients by data
ranks / sample size; experts must take part in that division or they come out that many times too large. Where ranks
share micro-batches, stock's sums would be over too many ranks or too few, and all gradients are summed here. Who holds
copies of what is written on each parameter: ``parallel.placement``.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_moe.distributed import ParallelMesh, all_reduce_sum, rank, world_size
from fairseq_moe.distributed.buckets import sum_in_buckets
from fairseq_moe.errors import NonFiniteError, RanksDisagreeError
from fairseq_moe.flags.sharding import Sharding
from fairseq_moe.models.decoder import MoEDecoder
from fairseq_moe.parallel.placement import (
    COPIED_OVER,
    gradient_divisor,
    is_expert,
    is_second_end,
    num_copies,
    place,
    placement_of,
)
from fairseq_moe.parallel.ranks import EXPERT_AXES, RankGrid
from fairseq_moe.stock.find_experts import any_flattened, moe_decoder
from fairseq_moe.stock.optim import float32_copies
from fairseq_moe.stock.run import run_of
from fairseq_moe.stock.seam import seam
from fairseq_moe.stock.step.guard import StepGuard, gradient_norms

__all__ = ["GradNorm", "sum_over_copies"]


@seam(
    "fairseq.optim.fairseq_optimizer:FairseqOptimizer.all_reduce_grads",
    signature="(self, module)",
    stock_does="reduces dense gradients and leaves those of parameters marked as experts alone",
    breaks="expert gradients come out world-size times too large, and replicas of an expert drift apart; where ranks "
    "share micro-batches no one group is right for all dense parameters",
    we_do="divide expert gradients by the number of data ranks and sum them over the replicas of each expert; where "
    "ranks share micro-batches do so with all gradients, each over the ranks that hold copies",
    test="tests/distributed/test_training_equality.py",
)
def all_reduce_grads(stock: Callable[..., Any], self: Any, module: nn.Module) -> None:
    decoder = moe_decoder(module)
    run = run_of(decoder)
    if run is not None:
        run.guard.see_before_sum(_not_summed(module, run.mesh))
    stock(self, module)
    if decoder is not None and decoder.mesh is not None and decoder.mesh.ranks.world_size > 1:
        _reduce_grads(module, decoder)


def _not_summed(module: nn.Module, mesh: ParallelMesh) -> list[Tensor]:
    """List the parameters whose gradients are this rank's own now and a sum over ranks soon."""
    # legacy_ddp, or ours; DistributedDataParallel has summed dense ones already.
    of_all, ranks = hasattr(module, "all_reduce_grads") or mesh.num_batch_ranks > 1, mesh.ranks
    return [
        p
        for p in module.parameters()
        if (of_all or is_expert(p))
        and not placement_of(p).sharded_over
        and num_copies(placement_of(p), ranks) > 1
    ]


def _reduce_grads(module: nn.Module, decoder: MoEDecoder) -> None:
    """Divide and sum the gradients that stock, or what shards states, has left to us."""
    assert decoder.mesh is not None
    run = run_of(decoder)
    held = [
        p
        for p in module.parameters()
        if p.requires_grad and (decoder.mesh.num_batch_ranks > 1 or is_expert(p))
    ]
    takes_root = decoder.moe.moe_normalize_expert_grad == "sqrt_world_size" and (
        any_flattened(held) or (run is not None and run.sharding is Sharding.ALL)
    )
    sum_over_copies(held, decoder.mesh, takes_root=takes_root)
    if decoder.mesh.ends is not None:
        _sum_at_both_ends([p for p in held if placement_of(p).is_at_both_ends], decoder.mesh.ends)


def _sum_at_both_ends(parameters: list[Tensor], ends: Any) -> None:
    """Add up the gradients that the first and the last stage have of tied words, in float32 at least."""
    for p in parameters:
        assert p.grad is not None
        summed = all_reduce_sum(p.grad.to(torch.promote_types(p.grad.dtype, torch.float32)), ends)
        p.grad = summed.to(p.grad.dtype)


def sum_over_copies(parameters: Iterable[Tensor], mesh: ParallelMesh, *, takes_root: bool = False) -> None:
    """Make gradients whole: the sum over all tokens by the number of data ranks; what has none gets zeros.

    Args:
        parameters: the same ones, in the same order, on all ranks that hold copies.
        mesh: of the run.
        takes_root: ``--moe-normalize-expert-grad sqrt_world_size`` is in force for experts.
    """
    alike: dict[tuple[tuple[str, ...], float], list[Tensor]] = {}
    for p in parameters:
        placement = placement_of(p)
        divisor = gradient_divisor(placement, mesh.ranks)
        if takes_root and "expert" in placement.cut_over:
            # What is left in is the root of how many ranks hold other experts, as where no micro-batch is shared.
            divisor = math.sqrt(divisor * mesh.ranks.data / mesh.ranks.stage_size)
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        alike.setdefault((placement.copied_over, divisor), []).append(p.grad)
    for (axes, divisor), grads in alike.items():
        torch._foreach_div_(grads, divisor)  # before a sum: those of half precision stay in range
        if mesh.ranks.size(axes) == 1:
            continue
        group = mesh.groups_by_axes[axes]
        if mesh.num_batch_ranks > 1:
            sum_in_buckets(grads, group)
        else:
            for grad in grads:
                all_reduce_sum(grad, group)


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
    ranks = RankGrid(data=world_size()) if run is None else run.mesh.ranks
    for master, parameter in float32_copies(self.optimizer):
        place([master], placement_of(parameter))  # stock has handed on its own mark alone
    aggregate = GradNorm(ranks, guard=guard, update=update)
    try:
        norm = self.optimizer.clip_grad_norm(clip_norm, aggregate_norm_fn=aggregate)
    except FloatingPointError as error:
        if guard is None:
            raise
        # --fp16 at its smallest loss scale; stock would run the model again, to find out where.
        raise NonFiniteError(str(error), agreed=True) from error
    norm = norm.cpu()  # where the sample size is a sum over ranks, a product with it was on the device
    if run is not None:
        run.guard.skip_if_bad(norm, run.state.named_parameters, update)
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
        ranks: of the run, numbered along each axis.
        guard: what else the ranks agree on with that all-reduce; None: nothing.
        update: the number of updates that this rank has made.
    """

    def __init__(self, ranks: RankGrid, *, guard: StepGuard | None = None, update: int = 0) -> None:
        self.ranks = ranks
        in_use = dict.fromkeys(self._in_use(axes) for axes in COPIED_OVER)
        self._copied_axes = [axes for axes in in_use if axes]
        self.guard = guard
        self.update = update

    @torch.no_grad()
    def clip(self, params: list[Tensor], max_norm: float) -> Tensor:
        """Scale the gradients so that their norm is at most ``max_norm`` (0: leave them) and return the norm
        before.

        Every rank gets the same number, so that all skip a step with a non-finite gradient together. It is
        NaN when a rank's loss is not finite. It is on the host, because stock asks it half a dozen questions.

        Raises:
            RanksDisagreeError: ranks that hold copies of a gradient disagree about it, or ranks are at different
                updates.
        """
        with_grad = [p for p in params if p.grad is not None]
        grads = [p.grad for p in with_grad if p.grad is not None]
        device = params[0].device if params else torch.device("cpu")
        total_sq = self._total(with_grad, device)
        is_double = any(grad.dtype == torch.float64 for grad in grads)
        norm = torch.tensor(math.sqrt(total_sq), dtype=torch.float64 if is_double else torch.float32)
        if max_norm > 0:
            torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp_(max=1).to(device))
        return norm

    def _total(self, params: list[Tensor], device: torch.device) -> float:
        """Sum the squares of all gradients over all ranks, each copy once; NaN where a loss is not finite."""
        by_axes = self._by_axes(params)
        copied = [self._copied(axes, by_axes.get(axes, []), device) for axes in self._copied_axes]
        own = torch.cat([_squared_norm(by_axes.get(None, []), device).unsqueeze(0), *copied])
        num_guarded = 0
        if self.guard is not None:
            guarded = self.guard.values(self.update, device)
            own, num_guarded = torch.cat([own, guarded]), len(guarded)
        numbers = all_reduce_sum(own).tolist()  # the one place that waits for the device
        if self.guard is not None and not self.guard.judge(numbers[-num_guarded:], update=self.update):
            return math.nan
        total, position = numbers[0], 1
        for axes in self._copied_axes:
            num_slots = self.ranks.num_slots(axes)
            for slot in range(num_slots):
                summed, square = numbers[position + slot], numbers[position + num_slots + slot]
                total += self._checked_mean(axes, slot, summed, square)
            position += 2 * num_slots
        return total

    def _by_axes(self, params: list[Tensor]) -> dict[tuple[str, ...] | None, list[Tensor]]:
        """Sort gradients by the axes along which ranks hold the same numbers; None: this rank alone holds them."""
        found: dict[tuple[str, ...] | None, list[Tensor]] = {}
        for p in params:
            placement = placement_of(p)
            is_alone = num_copies(placement, self.ranks) == 1
            axes = None if is_alone else self._in_use(placement.copied_over)
            assert axes is None or axes in self._copied_axes, f"no sum is taken over {axes}"
            if p.grad is not None and not is_second_end(placement, self.ranks, rank()):
                found.setdefault(axes, []).append(p.grad)
        return found

    def _in_use(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        """Leave out axes of one rank, so that what is held by the same ranks is counted together."""
        return tuple(axis for axis in axes if self.ranks.size([axis]) > 1)

    def _copied(self, axes: tuple[str, ...], grads: list[Tensor], device: torch.device) -> Tensor:
        """Sum the squares of what has copies along these axes, and square the sum, in this rank's slot.

        Returns:
            (2 * slots,) float64.
        """
        num_slots, slot = self.ranks.num_slots(axes), self.ranks.slot(rank(), axes)
        numbers = torch.zeros(2 * num_slots, dtype=torch.float64, device=device)
        numbers[slot] = _squared_norm(grads, device)
        numbers[num_slots + slot] = numbers[slot] ** 2
        return numbers

    def _checked_mean(self, axes: tuple[str, ...], slot: int, summed: float, square: float) -> float:
        """Give the sum of squares of one copy, from the sums over all copies and over their squares."""
        copies = self.ranks.size(axes)
        mean = summed / copies
        spread = math.sqrt(max(square / copies - mean**2, 0.0)) if math.isfinite(mean) else 0.0
        if spread > 1e-6 * (mean + 1e-12):
            members = ", ".join(str(member) for member in self.ranks.groups(axes)[slot])
            what = "an expert" if axes[0] in EXPERT_AXES else "the dense parameters"
            raise RanksDisagreeError(
                f"gradients of {what} differ between ranks {members}, which hold copies (mean {mean:.9g} and spread "
                f"{spread:.9g} of the squared norm); look for a rank with other code, other hardware or its own "
                "random numbers.",
                agreed=True,
            )
        return mean


def _squared_norm(grads: list[Tensor], device: torch.device) -> Tensor:
    """Sum the squares of all elements: a float64 scalar; each tensor's norm is taken in float32 or wider."""
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([norm.to(device) for norm in gradient_norms(grads)]).double().square().sum()
