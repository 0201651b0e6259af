"""What the ranks agree on at every update, on the all-reduce that the gradient norm needs anyway.

Each rank adds a vector of small numbers to that sum: whether its loss is finite, which update it is at, and what
it has been asked for by signals. All ranks read the same sum and so decide the same. An update whose loss or
gradients are not finite is skipped by all of them as stock skips an overflow under --fp16: parameters and
optimizer state stay as they are, the update is not counted, the learning rate does not move, and the next
batch is tried.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fairseq_moe.distributed import all_reduce_sum, gather_values, rank, world_size
from fairseq_moe.errors import NonFiniteError, RanksDisagreeError
from fairseq_moe.flags.reliability import ReliabilityConfig
from fairseq_moe.parallel.placement import num_copies, placement_of
from fairseq_moe.parallel.ranks import BATCH_RANKS, RankGrid
from fairseq_moe.stock.step.loss_spikes import LossSpikes
from fairseq_moe.stock.step.signals import Signals
from fairseq_moe.stock.step.words_read import WordsRead

__all__ = ["StepGuard", "gradient_norms"]

logger = logging.getLogger(__name__)

NamedParameters = Callable[[], Iterable[tuple[str, Tensor]]]

_COUNTER_RANGE = 1 << 16  # sums of squares of what is smaller are exact in float64 for any number of ranks


class StepGuard:
    """Take one rank's part in the agreement, and keep what came out of it.

    Args:
        config: when to give up.
        ranks: of the run, numbered along each axis.

    Attributes:
        stop: every rank knows that the run ends after this update.
        save: every rank knows that a checkpoint is wanted now.
        save_now: writes it, wherever in an epoch the run is.
        has_background_save: this rank has written its part of an asynchronous checkpoint.
        all_have_background_save: at the last update that was so on every rank.
    """

    NUM_VALUES = 8

    def __init__(self, config: ReliabilityConfig, ranks: RankGrid) -> None:
        self.config = config
        self.ranks = ranks
        self._words = WordsRead(ranks) if ranks.size(BATCH_RANKS) > 1 else None
        self.signals = Signals()
        self.stop = False
        self.save = False
        self.save_now: Callable[[], None] = _nothing_to_save
        self.has_background_save = False
        self.all_have_background_save = False
        self.is_first_update = True  # of this process
        self.num_skipped = 0  # in a row
        self._spikes = LossSpikes(config.skip_loss_spikes_factor)
        self._spike: str | None = None
        self._loss_is_bad: Tensor | None = None
        self._hidden_is_bad: dict[int, Tensor] = {}  # by the number of layers before them
        self._loss_and_size: list[tuple[Tensor, Any]] = []
        self._before_sum: list[tuple[Tensor, Tensor]] = []

    def begin_update(self) -> None:
        """Forget the last update's losses and gradients."""
        self._loss_is_bad = None
        self._hidden_is_bad = {}
        self._loss_and_size = []
        self._before_sum = []
        if self._words is not None:
            self._words.begin_update()

    def see_micro_batch(self, sample: Mapping[str, Any]) -> None:
        """Note which words a micro-batch has, where further ranks must have read the same; nothing waits."""
        if self._words is not None:
            self._words.see(sample)

    def see_loss(self, loss: Tensor, sample_size: Any) -> None:
        """Note a micro-batch's loss, a sum over ``sample_size`` tokens; nothing waits for the device."""
        is_bad = ~torch.isfinite(loss.detach()).all()
        if self.ranks.coordinate(rank(), "pipe") < self.ranks.pipe - 1:
            is_bad = torch.zeros_like(is_bad)  # the last stage has computed it, and told it to the others
        self._loss_is_bad = is_bad if self._loss_is_bad is None else self._loss_is_bad | is_bad
        if self._spikes.factor is not None:
            self._loss_and_size.append((loss.detach(), sample_size))

    def see_hidden(self, x: Tensor, num_layers: int) -> None:
        """Note hidden values that go to the next stage, after so many layers; nothing waits for the device."""
        is_bad = ~torch.isfinite(x.detach()).all()
        before = self._hidden_is_bad.get(num_layers)
        self._hidden_is_bad[num_layers] = is_bad if before is None else before | is_bad

    def see_before_sum(self, parameters: list[Tensor]) -> None:
        """Note the norms of this rank's own gradients, before a sum over ranks hides which rank's was bad."""
        found = [(p, p.grad) for p in parameters if p.grad is not None]
        norms = gradient_norms([grad for _, grad in found])
        self._before_sum += [(p, norm) for (p, _), norm in zip(found, norms, strict=True)]

    def values(self, update: int, device: torch.device) -> Tensor:
        """Collect this rank's numbers, to be summed over ranks: (NUM_VALUES + those about words,) float64."""
        count = float(update % _COUNTER_RANGE)
        flags = [self.signals.stop, self.signals.take_save(), self.has_background_save]
        numbers = [0.0, count, count**2, *map(float, flags), 0.0, 0.0]
        # Only from pinned memory are numbers brought to a device without the host's waiting for it.
        vector = torch.tensor(numbers, dtype=torch.float64, pin_memory=device.type == "cuda")
        vector = vector.to(device, non_blocking=True)
        if self._loss_is_bad is not None:
            vector[0] = self._loss_is_bad
        for loss, size in self._loss_and_size:
            vector[6] += loss
            vector[7] += size
        return vector if self._words is None else torch.cat([vector, self._words.values(rank(), device)])

    def judge(self, sums: list[float], *, update: int) -> bool:
        """Draw this update's conclusions, the same on every rank.

        Args:
            sums: of every rank's ``values``.
            update: the number of updates that this rank has made.

        Returns:
            whether the losses of all ranks are finite.

        Raises:
            RanksDisagreeError: ranks are at different updates, or have read different words of one micro-batch.
        """
        num_ranks = self.ranks.world_size
        bad_losses, count, square, stop, save, saved = (int(value) for value in sums[:6])
        if num_ranks * square != count**2:
            updates = gather_values(update)  # every rank has seen the same sums and is here
            listed = ", ".join(f"rank {number}: {each}" for number, each in enumerate(updates))
            raise RanksDisagreeError(
                f"ranks have met at different updates ({listed}), so they have not started from one "
                "checkpoint; give all ranks the same --save-dir and --restore-file.",
                agreed=True,
            )
        if self._words is not None:
            self._words.judge(sums[self.NUM_VALUES :])
        self.stop |= stop > 0
        self.save |= save > 0
        self.all_have_background_save = saved == num_ranks
        loss_sum, sample_size = sums[6 : self.NUM_VALUES]
        self._spike = self._spikes.problem(loss_sum / sample_size) if sample_size > 0 else None
        return bad_losses == 0

    def agree_on_signals(self, device: torch.device) -> None:
        """Learn of the signals of all ranks where no gradient norm is taken: in validation. Collective."""
        asked = torch.tensor([self.signals.stop, self.signals.take_save()], dtype=torch.int32, device=device)
        stop, save = all_reduce_sum(asked).tolist()
        self.stop |= stop > 0
        self.save |= save > 0

    def skip_if_bad(self, norm: Tensor, named_parameters: NamedParameters, update: int) -> None:
        """Skip this update on all ranks if ``norm``, the same number on each, is not finite, or the loss a spike.

        Args:
            norm: of all gradients.
            named_parameters: lists them with their gradients, which is asked for only then.
            update: the number of updates that this rank has made.

        Raises:
            OverflowError: so it is; stock's trainer goes on with the next batch.
            NonFiniteError: that has happened too often in a row.
        """
        if not bool(torch.isfinite(norm)):
            # All ranks are here, so one more question may be asked.
            _, cause = min(
                gather_values(self._finding(dict(named_parameters()))), key=lambda finding: finding[0]
            )
        elif self._spike is not None:
            cause = self._spike
        else:
            self.num_skipped = 0
            return
        self.num_skipped += 1
        if self.num_skipped >= self.config.max_skipped_updates:
            raise NonFiniteError(
                f"{self.num_skipped} updates in a row were skipped after update {update}, the last one because "
                f"{cause}; resume from an earlier checkpoint with a lower --lr or --clip-norm, or raise "
                "--max-skipped-updates.",
                agreed=True,
            )
        if rank() == 0:
            logger.warning(
                "%s; all ranks skip this update (%d in a row after update %d, at %d the run ends).",
                cause,
                self.num_skipped,
                update,
                self.config.max_skipped_updates,
            )
        raise OverflowError("all ranks skip this update")

    def _finding(self, parameters: Mapping[str, Tensor]) -> tuple[float, str]:
        """Find what is bad on this rank: how far that is from the cause (the nearest is told), and a phrase."""
        here = f"on rank {rank()}"
        for num_layers, is_bad in sorted(self._hidden_is_bad.items()):
            if bool(is_bad):  # the loss comes after all layers
                return -1 / num_layers, f"the output of layer {num_layers - 1} {here} is not finite"
        names = {id(p): name for name, p in parameters.items()}
        after = [p for p in parameters.values() if p.grad is not None and not _is_finite(p.grad)]
        if self._loss_is_bad is not None and bool(self._loss_is_bad):
            first = f" (first bad gradient: {names[id(after[0])]})" if after else ""
            return 0, f"the loss {here} is not finite{first}"
        for p, norm in self._before_sum:
            if not _is_finite(norm):
                return 1, f"the gradient of {names[id(p)]} {here} is not finite"
        seen = {id(p) for p, _ in self._before_sum}
        for p in after:
            placement = placement_of(p)
            is_own = world_size() == 1 or (
                not placement.sharded_over and num_copies(placement, self.ranks) == 1
            )
            if is_own and id(p) not in seen:
                return 2, f"the gradient of {names[id(p)]} {here} is not finite"
        if after:
            return 3, f"the gradient of {names[id(after[0])]}, summed over ranks, is not finite"
        return 4, "the norm of all gradients is not finite"


def gradient_norms(grads: list[Tensor]) -> list[Tensor]:
    """Take the norm of each gradient in float32 or float64: half precision is read as it is, without a copy."""
    is_double = any(grad.dtype == torch.float64 for grad in grads)
    dtype = torch.float64 if is_double else torch.float32
    return list(torch._foreach_norm(grads, 2, dtype=dtype)) if grads else []


def _nothing_to_save() -> None:
    """Save nothing, before the first update."""


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
