"""The load of the experts: written to a file, and a warning when one of them has taken most tokens for long."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_moe.distributed import rank
from fairseq_moe.expert_load.record import LOAD_KEY, LoadRecord, append_record
from fairseq_moe.models.decoder import MoEDecoder
from fairseq_moe.stock.seam import seam

__all__ = ["brought_together", "record_expert_load_after_validation", "write_expert_load"]

logger = logging.getLogger(__name__)


@seam(
    "fairseq.tasks.fairseq_task:FairseqTask.reduce_metrics",
    signature="(self, logging_outputs, criterion)",
    stock_does="logs numbers, and nobody reads hundreds of them",
    breaks="a router that sends most tokens to one expert goes unnoticed: its rank computes and holds most of the "
    "layer, or most tokens are dropped",
    we_do="rank 0 warns when that has been so in each of the last 100 updates, and whenever that number has doubled; "
    "all numbers come to the host in one copy, where stock waits for each of them in every update",
    test="tests/reliability/test_r14_one_expert_takes_all.py",
)
def reduce_metrics(stock: Callable[..., Any], self: Any, logging_outputs: Any, criterion: Any) -> None:
    if any(LOAD_KEY in log for log in logging_outputs):
        logging_outputs = brought_together(logging_outputs)
    stock(self, logging_outputs, criterion)
    watch = getattr(criterion, "load_watch", None)
    loads = [log[LOAD_KEY] for log in logging_outputs if LOAD_KEY in log]
    if watch is not None and loads and criterion.training and rank() == 0:
        for sentence in watch.observe(sum(loads)):
            logger.warning(sentence)


def brought_together(logging_outputs: list[dict[str, Any]], *, source: str = "cuda") -> list[dict[str, Any]]:
    """Bring all tensors of logging outputs to the host in one copy, each in its dtype.

    Args:
        logging_outputs: of criteria; what is on the host already stays as it is.
        source: type of the device that tensors come from.
    """
    found = [
        value
        for log in logging_outputs
        for value in log.values()
        if isinstance(value, Tensor) and value.device.type == source
    ]
    if not found:
        return logging_outputs
    # Concatenation converts to one dtype: beside float32 alone, counts would be rounded to it. float64 holds both.
    is_mixed = len({value.dtype for value in found}) > 1
    wide = [found[0].new_empty(0, dtype=torch.float64)] if is_mixed else []
    parts = iter(
        torch.cat([*wide, *(value.detach().reshape(-1) for value in found)])
        .to("cpu", copy=True)
        .split([value.numel() for value in found])
    )
    moved = iter(next(parts).view(value.shape).to(value.dtype) for value in found)
    return [
        {
            name: next(moved) if isinstance(value, Tensor) and value.device.type == source else value
            for name, value in log.items()
        }
        for log in logging_outputs
    ]


def record_expert_load_after_validation(trainer: Any, task: Any, decoder: MoEDecoder) -> None:
    """Append the load to moe_load.jsonl in ``task.post_validate``, which stock calls after each validation."""
    earlier = getattr(task, "post_validate", None)

    def post_validate(model: nn.Module, stats: dict[str, Any], agg: Any) -> None:
        if earlier is not None:
            earlier(model, stats, agg)
        if LOAD_KEY in agg and trainer.is_data_parallel_master:
            write_expert_load(trainer, decoder, agg[LOAD_KEY].sum, split="valid")

    task.post_validate = post_validate


def write_expert_load(trainer: Any, decoder: MoEDecoder, load: Tensor, *, split: str) -> None:
    """Append the load of an update or a validation to moe_load.jsonl; failing to do so ends no run.

    Args:
        trainer: of the run.
        decoder: with the experts.
        load: summed over ranks and micro-batches.
        split: "train" or "valid".
    """
    if trainer.cfg.checkpoint.no_save:
        return
    update = trainer.get_num_updates()
    record = LoadRecord.from_load(load, split=split, update=update, layers=decoder.moe_layers)
    try:
        append_record(trainer.cfg.checkpoint.save_dir, record)
    except OSError as error:
        logger.warning("the load of the experts could not be recorded (%s); training goes on.", error)
