"""The load of the experts: written to a file, and a warning when one of them has taken most tokens for long."""

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fairseq_moe.distributed import rank
from fairseq_moe.expert_load.record import LOAD_KEY, LoadRecord, append_record
from fairseq_moe.models.decoder import MoEDecoder
from fairseq_moe.stock.seam import seam

__all__ = ["record_expert_load_after_validation", "write_expert_load"]

logger = logging.getLogger(__name__)


@seam(
    "fairseq.tasks.fairseq_task:FairseqTask.reduce_metrics",
    signature="(self, logging_outputs, criterion)",
    stock_does="logs numbers, and nobody reads hundreds of them",
    breaks="a router that sends most tokens to one expert goes unnoticed: its rank computes and holds most of the "
    "layer, or most tokens are dropped",
    we_do="rank 0 warns when that has been so in each of the last 100 updates, and whenever that number has doubled",
    test="tests/reliability/test_r14_one_expert_takes_all.py",
)
def reduce_metrics(stock: Callable[..., Any], self: Any, logging_outputs: Any, criterion: Any) -> None:
    stock(self, logging_outputs, criterion)
    watch = getattr(criterion, "load_watch", None)
    loads = [log[LOAD_KEY] for log in logging_outputs if LOAD_KEY in log]
    if watch is not None and loads and criterion.training and rank() == 0:
        for sentence in watch.observe(sum(loads)):
            logger.warning(sentence)


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
