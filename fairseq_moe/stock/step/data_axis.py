"""Which ranks does stock's trainer take turns with, where several ranks share a micro-batch?

Stock knows one axis: each rank reads batches of its own. Ranks that differ along ``pipe``, ``context`` or ``tensor``
alone read the same ones, so what stock takes for all ranks is the axis ``data`` of the mesh there. Elsewhere stock's
answers stay.
"""

from collections.abc import Callable
from typing import Any

from fairseq import utils

from fairseq_moe.distributed import rank
from fairseq_moe.flags.sharding import sharding_of
from fairseq_moe.stock.run import split_mesh
from fairseq_moe.stock.seam import seam

__all__: list[str] = []

_TEST = "tests/distributed/test_data_axis.py"
_SEED_STEP = 1_000_003  # between the ranks of a micro-batch; updates count up by one


@seam(
    "fairseq.trainer:Trainer.data_parallel_world_size",
    signature=None,
    stock_does="counts all ranks",
    breaks="ranks that share a micro-batch would get different ones, and gradients another factor",
    we_do="count the ranks of the data axis where several ranks share a micro-batch",
    test=_TEST,
)
def data_parallel_world_size(stock: Callable[..., Any], self: Any) -> Any:
    mesh = split_mesh(self)
    return stock(self) if mesh is None else mesh.ranks.data


@seam(
    "fairseq.trainer:Trainer.data_parallel_rank",
    signature=None,
    stock_does="numbers all ranks",
    breaks="as data_parallel_world_size",
    we_do="number the ranks of the data axis where several ranks share a micro-batch",
    test=_TEST,
)
def data_parallel_rank(stock: Callable[..., Any], self: Any) -> Any:
    mesh = split_mesh(self)
    return stock(self) if mesh is None else mesh.ranks.coordinate(mesh.rank, "data")


@seam(
    "fairseq.trainer:Trainer.data_parallel_process_group",
    signature=None,
    stock_does="names all ranks",
    breaks="the statistics of a micro-batch would be added up once for each rank that shares it",
    we_do="name the ranks of the data axis where several ranks share a micro-batch",
    test=_TEST,
)
def data_parallel_process_group(stock: Callable[..., Any], self: Any) -> Any:
    mesh = split_mesh(self)
    return stock(self) if mesh is None else mesh.data


@seam(
    "fairseq.trainer:Trainer.is_data_parallel_master",
    signature=None,
    stock_does="lets the first data rank write files and logs",
    breaks="each of the ranks that share its micro-batches would write the same files",
    we_do="let rank 0 alone",
    test=_TEST,
)
def is_data_parallel_master(stock: Callable[..., Any], self: Any) -> Any:
    return stock(self) if split_mesh(self) is None else rank() == 0


@seam(
    "fairseq.trainer:Trainer.use_distributed_wrapper",
    signature=None,
    stock_does="wraps the model where there is more than one data rank",
    breaks="stock's wrappers sum all gradients over data ranks, and none shards states over context",
    we_do="where several ranks share a micro-batch, wrap only to shard states",
    test=_TEST,
)
def use_distributed_wrapper(stock: Callable[..., Any], self: Any) -> Any:
    return stock(self) if split_mesh(self) is None else sharding_of(self.cfg) is not None


@seam(
    "fairseq.trainer:Trainer._set_seed",
    signature="(self)",
    stock_does="seeds all ranks alike, for each update anew",
    breaks="all ranks that share a micro-batch would draw one dropout mask for their different tokens and heads",
    we_do="add a large multiple of the rank's place among them",
    test=_TEST,
)
def set_seed(stock: Callable[..., Any], self: Any) -> None:
    mesh = split_mesh(self)
    if mesh is None:
        stock(self)
        return
    place = mesh.ranks.slot(mesh.rank, ["data"])  # among the ranks that read the same: (p C + c) T + t
    utils.set_torch_seed(self.cfg.common.seed + self.get_num_updates() + _SEED_STEP * place)
