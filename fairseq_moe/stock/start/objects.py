"""Stock's exchange of Python objects between ranks, which needs CUDA or an older torch."""

from collections.abc import Callable
from typing import Any

from fairseq import utils
from fairseq.distributed import utils as distributed_utils

from fairseq_moe.distributed import broadcast_value, gather_values
from fairseq_moe.stock.seam import seam


@seam(
    "fairseq.distributed.utils:_broadcast_object_slow",
    signature="(obj, src_rank, group, dist_device)",
    stock_does="sends rank 0's objects through torch.save and torch.load",
    breaks="torch.load refuses anything but plain data since torch 2.6, so no multi-process run can resume",
    we_do="send them with torch.distributed; they come from our own rank 0",
    test="tests/e2e/test_launch.py",
)
def broadcast_object_slow(
    stock: Callable[..., Any], obj: Any, src_rank: int, group: Any, dist_device: Any
) -> Any:
    if distributed_utils.use_xla():
        return stock(obj, src_rank, group, dist_device)
    return broadcast_value(obj, src=src_rank, group=group, device=dist_device)


@seam(
    "fairseq.distributed.utils:all_gather_list",
    signature="(data, group, max_size)",
    stock_does="gathers objects in a CUDA buffer of a size given beforehand",
    breaks="fairseq-validate and criterions whose outputs cannot be summed need CUDA; the statistics of an "
    "MoE model are larger than the buffer",
    we_do="gather them with torch.distributed, whatever their size",
    test="tests/e2e/test_commands.py",
)
def all_gather_list(
    stock: Callable[..., Any], data: Any, group: Any = None, max_size: int = 16384
) -> list[Any]:
    if distributed_utils.use_xla():
        return stock(data, group, max_size)
    return gather_values(utils.move_to_cpu(data), group=group)
