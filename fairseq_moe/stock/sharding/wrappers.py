"""Data-parallel wrappers: torch's DistributedDataParallel on CPU, experts that it must leave alone, sharded states."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fairseq_moe.parallel.placement import is_expert
from fairseq_moe.stock.find_experts import moe_decoder
from fairseq_moe.stock.proxy import ModuleProxy
from fairseq_moe.stock.run import run_of
from fairseq_moe.stock.seam import seam


@seam(
    "fairseq.models.distributed_fairseq_model:DistributedDataParallel",
    signature=None,
    stock_does="always names a CUDA device, broadcasts rank 0's parameters and averages all gradients",
    breaks="--ddp-backend pytorch_ddp cannot run on CPU; experts of other ranks are overwritten and "
    "averaged away",
    we_do="no device on CPU; expert parameters are on torch's list of parameters to ignore",
    test="tests/distributed/test_training_equality.py",
)
def distributed_data_parallel(stock: Any) -> Any:
    def wrap(*, module: nn.Module, device_ids: Any, output_device: Any, **kwargs: Any) -> nn.Module:
        if all(p.device.type == "cpu" for p in module.parameters()):
            device_ids = output_device = None
        if moe_decoder(module) is not None:
            names = [name for name, p in module.named_parameters() if is_expert(p)]
            stock._set_params_and_buffers_to_ignore_for_model(module, names)
        return stock(module=module, device_ids=device_ids, output_device=output_device, **kwargs)

    return wrap


@seam(
    "fairseq.models:DistributedFairseqModel",
    signature="(args, model, process_group, device)",
    stock_does="wraps the model as --ddp-backend says",
    breaks="there is no backend that shards states with torch's own fully_shard, or experts over their replicas alone",
    we_do="with --use-distributed-optimizer or --use-torch-fsdp2, a ShardedModel around a model with experts",
    test="tests/distributed/test_sharded_states.py",
)
def distributed_model(
    stock: Callable[..., Any], args: Any, model: nn.Module, process_group: Any, device: Any
) -> nn.Module:
    decoder = moe_decoder(model)
    run = run_of(decoder)
    if decoder is None or run is None or run.sharding is None:
        wrapped: nn.Module = stock(args, model, process_group, device)
        return wrapped
    from fairseq_moe.stock.sharding.sharded_model import ShardedModel  # a second, which others need not wait

    # Stock's group of all ranks has a queue of its own: gathers there need not wait for the exchange of tokens.
    group = process_group if run.mesh.num_batch_ranks == 1 else run.mesh.dense_shards
    return ShardedModel(model.to(device), decoder, group, run.sharding)


@seam(
    "fairseq.trainer:torch",
    signature=None,
    stock_does="answers a gradient overflow with torch.tensor(0.0).cuda()",
    breaks="an fp16 run on a machine without CUDA dies at its first overflow",
    we_do="on such a machine that module's torch.tensor gives tensors whose cuda() is the tensor itself",
    test="tests/distributed/test_precision.py",
)
def torch_of_trainer(stock: Any) -> Any:
    if torch.cuda.is_available():
        return stock

    def tensor(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = torch.tensor(*args, **kwargs)
        made.cuda = lambda: made  # type: ignore[method-assign,assignment,misc]
        return made

    return ModuleProxy(stock, tensor=tensor)
