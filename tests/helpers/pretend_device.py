"""Pretend on CPU that tensors lie on a device, and count the places at which the host would wait for it.

What comes from numbers or sizes without a device named, and what is brought to the CPU, lies on the host; so does what
is computed from such tensors alone. All else lies on the device. The host waits where a number or a number of elements
comes out of a tensor there, for every copy to the host, and for a copy to the device that may not run behind its back.
"""

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["PretendDevice", "take_the_ways_of_a_gpu"]

# Operations whose result, or its size, is a number that the host reads.
_READS = {
    "_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
}  # fmt: skip
_INTERPRETER = "/triton/runtime/"  # reads tensors as its way to compute
_PACKAGES = ("/fairseq_moe/", "/fairseq/", "/fairscale/", "/tests/")


def take_the_ways_of_a_gpu() -> None:
    """Run fused kernels by Triton's interpreter and the experts' products as one launch each. For forked ranks only."""
    from fairseq_moe.fused import launch
    from fairseq_moe.modules import experts
    from fairseq_moe.modules.kernels.table import Kernel

    launch.DEVICES.add("cpu")
    experts.choose_kernel = lambda *args, **options: Kernel.TRITON


class PretendDevice(TorchDispatchMode):
    """Count waits while it is active.

    Attributes:
        waits: how often, by the file of the place within its package.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self._on_host: dict[int, Tensor] = {}  # by address; kept alive, so that none is used again
        self._patches = ExitStack()

    def __enter__(self) -> Any:
        from fairseq_moe.stock.step.expert_load import brought_together

        for owner, name, function in (
            (Tensor, "to", lambda tensor, *args, **options: self._to(tensor, *args, **options)),
            (Tensor, "cpu", lambda tensor: tensor.to("cpu")),
            (Tensor, "tolist", lambda tensor: self._tolist(tensor)),
            (torch, "tensor", self._tensor),
            (torch.onnx.operators, "shape_as_tensor", lambda x: self._put_on_host(torch._shape_as_tensor(x))),
        ):
            self._patches.enter_context(mock.patch.object(owner, name, function))
        self._patches.enter_context(mock.patch.dict(brought_together.__kwdefaults__, source="cpu"))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_on_host = bool(tensors) and all(map(self._is_on_host, tensors))
        name = func.overloadpacket.__name__
        if not is_on_host and (name in _READS or _reads_mask(name, args)):
            self._wait()
        if name == "copy_" and self._is_on_host(args[0]) != self._is_on_host(args[1]) and args[2:] != (True,):
            self._wait()
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result) if is_on_host else ():
            if isinstance(leaf, Tensor):
                self._put_on_host(leaf)
        return result

    def _to(self, tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        stock: Callable[..., Tensor] = torch._C.TensorBase.to
        device = options.get("device", args[0] if args else None)
        if device == "cpu" and isinstance(device, str) and not self._is_on_host(tensor):
            self._wait()
            return self._put_on_host(stock(tensor, *args, **{**options, "copy": True}))
        if isinstance(device, torch.device) and self._is_on_host(tensor):  # that of the run
            if not options.get("non_blocking"):
                self._wait()
            moved = stock(tensor, *args, **options)
            return torch.empty(moved.shape, dtype=moved.dtype).copy_(moved, non_blocking=True)
        return stock(tensor, *args, **options)

    def _tolist(self, tensor: Tensor) -> Any:
        if not self._is_on_host(tensor):
            self._wait()
        return torch._C.TensorBase.tolist(tensor)

    def _tensor(self, data: Any, *, device: Any = None, **options: Any) -> Tensor:
        made = _make_tensor(data, **options)
        if device is None:
            return self._put_on_host(made)
        self._wait()
        return made

    def _is_on_host(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._on_host

    def _put_on_host(self, tensor: Tensor) -> Tensor:
        if tensor.numel() > 0:
            self._on_host[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def _wait(self) -> None:
        frame, found = sys._getframe(1), None
        while frame is not None:
            path = frame.f_code.co_filename
            if _INTERPRETER in path:
                return
            if found is None and path != __file__:
                inside = next((path.rindex(package) for package in _PACKAGES if package in path), None)
                found = None if inside is None else path[inside + 1 :]
            frame = frame.f_back
        self.waits[found or "elsewhere"] += 1


_make_tensor = torch.tensor


def _reads_mask(name: str, args: Any) -> bool:
    """Tell whether rows are taken by a mask, whose number of rows the host must know."""
    indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)
