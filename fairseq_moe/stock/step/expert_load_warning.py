"""Telling the user that an expert has taken most of a layer's tokens for long."""

import logging
from collections.abc import Callable
from typing import Any

from fairseq_moe.distributed import rank
from fairseq_moe.expert_load.record import LOAD_KEY
from fairseq_moe.stock.seam import seam

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
