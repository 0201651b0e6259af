"""Shard the parameters of modules over ranks with torch's ``fully_shard``, and gather or cut tensors as it lays them.

A sharded parameter is a ``DTensor``. Nothing outside this file computes with one: ``ParameterShard`` gives its part of
this rank as a plain parameter on the same memory, and describes how the whole tensor lies on the ranks.

Importing this file takes a second, for torch's ``fsdp``: do it where states are sharded, and nowhere else.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from fairseq_moe.distributed.sharding import all_gather_stacked
from fairseq_moe.parallel.placement import shard_dim

__all__ = ["ParameterShard", "free_gathered", "set_gradient_sync", "shard_module", "shard_of"]


def shard_module(
    module: nn.Module,
    group: dist.ProcessGroup,
    *,
    frees_after_forward: bool,
    left_alone: Iterable[nn.Parameter] = (),
) -> None:
    """Shard the parameters of ``module`` that are not sharded yet over ``group``, in place; on the module's device.

    Args:
        module: its forward pass gathers them, and its backward pass gathers them again where they were freed, and
            averages their gradients over the group.
        group: at least two ranks; the parameters are equal on all of them.
        frees_after_forward: whether the gathered parameters are freed between the two passes.
        left_alone: parameters that stay as they are.
    """
    num_ranks = dist.get_world_size(group)
    device_type = next(module.parameters()).device.type
    fully_shard(
        module,
        mesh=DeviceMesh.from_group(group, device_type),
        reshard_after_forward=frees_after_forward,
        shard_placement_fn=lambda p: Shard(shard_dim(p.shape, num_ranks)),
        ignored_params=set(left_alone),
    )
    # Torch warns of outputs that are views, which callers must not change in place. Ours and stock's do not: what
    # they return is compared with other backends in every gradient.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # A parameter that one rank's pass has left out must not change what the ranks send one another.
    assert isinstance(module, FSDPModule)
    module.set_reduce_scatter_unused_params(True)


def set_gradient_sync(
    module: nn.Module, is_on: bool, *, keeps_gathered: bool, left_alone: Iterable[nn.Module] = ()
) -> None:
    """Reduce gradients at the end of the next backward passes, or let whole ones add up on each rank until then.

    Args:
        module: sharded, or modules inside are.
        is_on: whether to reduce.
        keeps_gathered: while it is off, parameters stay gathered after a backward pass, too.
        left_alone: modules inside that stay as they are.
    """
    others = {id(child) for other in left_alone for child in other.modules()}
    for child in module.modules():
        if isinstance(child, FSDPModule) and id(child) not in others:
            child.set_requires_gradient_sync(is_on, recurse=False)
            child.set_reshard_after_backward(is_on or not keeps_gathered, recurse=False)


def free_gathered(module: nn.Module) -> None:
    """Free gathered parameters inside ``module``, so that its next pass gathers them as they are then."""
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()


@dataclass(frozen=True, kw_only=True, eq=False)
class ParameterShard:
    """Describe a sharded parameter, and this rank's part of it.

    Args:
        sharded: what the module holds.
        local: this rank's part as a plain parameter on the same memory; it may be empty.
        dim: the dimension along which the whole is divided.
        group: the ranks that hold the parts.
    """

    sharded: DTensor
    local: nn.Parameter
    dim: int
    group: dist.ProcessGroup

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole parameter."""
        return self.sharded.shape

    def take_gradient(self) -> None:
        """Move the gradient, averaged over the group, from the sharded parameter to the plain one; zero if none."""
        if not self.local.requires_grad:
            return
        grad = self.sharded.grad
        self.local.grad = grad.to_local() if isinstance(grad, DTensor) else torch.zeros_like(self.local)
        self.sharded.grad = None

    def gather(self, local: Tensor) -> Tensor:
        """Gather a tensor that is laid out like the parameter: the whole in fresh memory, on every rank of the group.

        Args:
            local: in the shape of this rank's part.
        """
        part = -(-self.shape[self.dim] // dist.get_world_size(self.group))
        first = local.detach().movedim(self.dim, 0)
        missing = part - len(first)
        if missing:
            first = F.pad(first, [0, 0] * (first.dim() - 1) + [0, missing])
        whole = all_gather_stacked(first, self.group).flatten(0, 1)
        return whole[: self.shape[self.dim]].movedim(0, self.dim).contiguous()

    def cut(self, whole: Tensor) -> Tensor:
        """Cut this rank's part out of a tensor in the shape of the whole parameter, in fresh memory."""
        parts = whole.detach().chunk(dist.get_world_size(self.group), dim=self.dim)
        place = dist.get_rank(self.group)
        found = parts[place] if place < len(parts) else whole.narrow(self.dim, 0, 0)
        return found.clone(memory_format=torch.contiguous_format)

    def sharded_like(self, whole: Tensor) -> Tensor:
        """Lay a tensor in the shape of the whole parameter out as it is, for the module's ``load_state_dict``."""
        part = self.cut(whole).to(self.local.device)
        return DTensor.from_local(
            part,
            self.sharded.device_mesh,
            self.sharded.placements,
            run_check=False,
            shape=self.shape,
            stride=self.sharded.stride(),
        )


def shard_of(parameter: Tensor, mark: Callable[[nn.Parameter], None]) -> ParameterShard | None:
    """Describe a parameter that ``shard_module`` has sharded; None: it is whole.

    Args:
        parameter: of a module.
        mark: writes on the plain parameter what the sharded one is, since torch has made a new one.
    """
    if not isinstance(parameter, DTensor):
        return None
    (placement,) = parameter.placements
    assert isinstance(placement, Shard)
    with torch.no_grad():
        local = nn.Parameter(parameter.to_local(), requires_grad=parameter.requires_grad)
    mark(local)
    group = parameter.device_mesh.get_group()
    return ParameterShard(sharded=parameter, local=local, dim=placement.dim, group=group)
