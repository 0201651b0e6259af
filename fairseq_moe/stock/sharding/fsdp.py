"""--ddp-backend fully_sharded: fairscale's FSDP on GPUs, on CPUs and in a single process.

Dense parameters are sharded over all ranks. The experts of a layer are wrapped apart, over the ranks that
hold the same experts (``models.decoder_layer.build_moe_layer``). Checkpoints of MoE models are written and read by
name with ``fsdp_state``; dense models keep stock's functions.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from fairseq.distributed.fully_sharded_data_parallel import has_FSDP
from torch import Tensor, nn

from fairseq_moe.distributed.sharding import gather_base, is_nccl_group, one_rank_group, reduce_scatter_base
from fairseq_moe.stock.find_experts import moe_decoder
from fairseq_moe.stock.proxy import ModuleProxy
from fairseq_moe.stock.run import run_of
from fairseq_moe.stock.seam import seam

if has_FSDP:
    from fairseq_moe.stock.sharding.fsdp_state import load_full_model_state

_TEST = "tests/distributed/test_fsdp.py"


@seam(
    "fairseq.distributed.fully_sharded_data_parallel:DummyProcessGroup",
    signature=None,
    stock_does="gives a single process a stand-in for a process group",
    breaks="fairscale asks torch.distributed for a second group, which is not initialised: RuntimeError",
    we_do="initialise a group of one rank",
    test=_TEST,
)
def dummy_process_group(stock: Any) -> Any:
    def make(rank: int, size: int) -> Any:
        return one_rank_group()

    return make


class _AdaptedFSDP:
    """Override methods of fairseq's wrapper, before which it is mixed in; the seam below gives the reasons."""

    def __init__(self, module: nn.Module, **config: Any) -> None:
        if config.get("compute_dtype") is torch.float16 and not config.get("mixed_precision"):
            module.half()  # fairscale expects it; stock would do so after wrapping
        if not is_nccl_group(config["process_group"]):
            config.setdefault("compute_device", torch.device("cpu"))
            # A second group would let reductions overlap with computation, which a CPU cannot do.
            config.setdefault("process_group_reduce_scatter", config["process_group"])
        super().__init__(module, **config)

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> Any:
        result = super()._apply(fn)
        if self.params and not self.move_params_to_cpu:
            self.compute_device = self.params[0].device
        return result

    def _post_reduction_hook(self, param: nn.Parameter, reduced_grad: Tensor) -> None:
        super()._post_reduction_hook(param, reduced_grad)
        if self.mixed_precision and not param._is_sharded:
            # reduced_grad is in float32 now. As with shards, the hook may run again before backward is over;
            # then fairscale makes the saved sum the gradient.
            saved = getattr(param, "_saved_grad_shard", 0.0)
            param._saved_grad_shard, param.grad = saved + reduced_grad, None

    def _free_full_params(self, params: list[nn.Parameter] | None = None) -> None:
        super()._free_full_params(self._set_up(params))

    def _use_fp32_param_shard(self, params: list[nn.Parameter] | None = None) -> None:
        super()._use_fp32_param_shard(self._set_up(params))

    def _set_up(self, params: list[nn.Parameter] | None) -> list[nn.Parameter]:
        """List the parameters that a forward pass has set up: blocks that it leaves out have nothing to free."""
        return [p for p in (self.params if params is None else params) if hasattr(p, "_fp32_shard")]

    def load_state_dict(
        self, state_dict: dict[str, Tensor], strict: bool = True, model_cfg: Any = None
    ) -> Any:
        if moe_decoder(self) is None:
            return super().load_state_dict(state_dict, strict=strict, model_cfg=model_cfg)
        load_full_model_state(self, state_dict)
        return None

    def _gather_optim_state(self, sd_state: dict[int, dict[str, Any]]) -> tuple[Any, Any]:
        gathered: dict[int, dict[str, Any]] = {}
        singletons: dict[int, dict[str, Any]] = {}
        for index, state in sd_state.items():
            gathered[index], singletons[index] = {}, {}
            for name, value in state.items():
                # One call per tensor: each gathers into a buffer of its own.
                one, single = super()._gather_optim_state({index: {name: value}})
                gathered[index].update(one[index])
                singletons[index].update(single[index])
        return gathered, singletons

    def gather_full_optim_state_dict(self, optim: Any, **ignored: Any) -> Any:
        unsharded = [p for p in self.parameters() if not p._is_sharded]
        for p in unsharded:
            p._full_param_padded = torch.empty(p.shape, device="meta")  # only its size is asked for
        try:
            return super().gather_full_optim_state_dict(optim, **ignored)
        finally:
            for p in unsharded:
                del p._full_param_padded


@seam(
    "fairseq.distributed.fully_sharded_data_parallel:FullyShardedDataParallel",
    signature=None,
    stock_does="computes on a CUDA device, refuses --memory-efficient-fp16 with fairscale 0.4.13, keeps the "
    "gradients of unsharded parameters in half precision, gathers Adam's two moments into one buffer, "
    "loads rank 0's parameters on all ranks, and frees blocks that no forward pass has used",
    breaks="nothing runs on CPU; loss scales are taken out of expert gradients in half precision; on CPU "
    "the saved exp_avg is exp_avg_sq; a single process cannot save; experts of other ranks are lost; frozen "
    "prediction blocks end the run: AttributeError",
    we_do="compute where the parameters are, halve the module before it is wrapped, keep those gradients in "
    "float32, gather each tensor by itself, load an MoE model by name from what each rank brings, and free "
    "what was set up",
    test=_TEST,
)
def fully_sharded_data_parallel(stock: Any) -> Any:
    return type(stock.__name__, (_AdaptedFSDP, stock), {"__module__": stock.__module__})


@seam(
    "fairseq.trainer:Trainer.consolidate_optimizer",
    signature="(self)",
    stock_does="gathers the optimizer state of all shards on rank 0",
    breaks="rank 0 has no use for the state of other ranks' experts, and not every rank may get here",
    we_do="nothing for an MoE model; the checkpoint code gathers by name, on all ranks",
    test=_TEST,
)
def consolidate_optimizer(stock: Callable[..., Any], self: Any) -> None:
    if run_of(self) is None:
        stock(self)
    else:
        self._gathered_optim_state = None


class _NoStream:
    """Stand for every CUDA stream where there is no CUDA: work is done when the call returns."""

    def wait_stream(self, other: "_NoStream") -> None:
        pass

    def synchronize(self) -> None:
        pass


class _NoCuda:
    _stream = _NoStream()

    def is_available(self) -> bool:
        return True  # so that fairscale sets up its streams

    def Stream(self) -> _NoStream:  # noqa: N802
        return self._stream

    def current_stream(self) -> _NoStream:
        return self._stream

    def stream(self, stream: _NoStream) -> AbstractContextManager[None]:
        return nullcontext()

    def synchronize(self) -> None:
        pass


class _CudaIfUsed:
    """Show ``torch.cuda`` in a process that has CUDA at work, else streams that do nothing."""

    def __init__(self) -> None:
        self._no_cuda = _NoCuda()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda if torch.cuda.is_initialized() else self._no_cuda, name)


def _declare_fairscale_seams() -> None:
    fsdp = "fairscale.nn.data_parallel.fully_sharded_data_parallel"

    @seam(
        f"{fsdp}:torch",
        signature=None,
        stock_does="orders its work with CUDA streams",
        breaks="there are none on a CPU",
        we_do="streams that do nothing, in a process that does not use CUDA",
        test=_TEST,
    )
    def torch_of_fairscale(stock: Any) -> Any:
        return ModuleProxy(stock, cuda=_CudaIfUsed())

    @seam(
        "torch:Tensor.record_stream",
        signature=None,
        stock_does="raises NotImplementedError for a CPU tensor",
        breaks="fairscale calls it on each gradient",
        we_do="nothing for a CPU tensor",
        test=_TEST,
    )
    def record_stream(stock: Callable[..., Any], self: Tensor, stream: Any) -> None:
        if self.device.type != "cpu":
            stock(self, stream)

    for module in (fsdp, "fairscale.internal.reduce_scatter_bucketer"):

        @seam(
            f"{module}:dist",
            signature=None,
            stock_does="gathers and reduces with private functions of torch.distributed, on stacked tensors",
            breaks="gloo takes flat tensors only",
            we_do="the public functions, on the same memory seen flat",
            test=_TEST,
        )
        def dist_of_fairscale(stock: Any) -> Any:
            return ModuleProxy(stock, _all_gather_base=gather_base, _reduce_scatter_base=reduce_scatter_base)


if has_FSDP:
    _declare_fairscale_seams()
