"""--use-distributed-optimizer (ZeRO-1) and --use-torch-fsdp2 (ZeRO-3): a model whose states torch shards over ranks.

Dense parameters are sharded over data and context ranks, experts over the ranks that hold the same ones. What is on one
rank alone stays as it is: there is nobody to share it with. Tensor ranks hold parts, or copies of shards. The
optimizer, its wrappers for half precision, the norm and checkpoints see plain parameters, this rank's parts:
``ShardedModel.parameters``.

Imported where states are sharded, and nowhere else: with torch's ``fsdp`` that takes a second.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fairseq_moe.distributed.shards import (
    ParameterShard,
    free_gathered,
    set_gradient_sync,
    shard_module,
    shard_of,
)
from fairseq_moe.flags.sharding import Sharding
from fairseq_moe.models.decoder import MoEDecoder
from fairseq_moe.modules import Experts
from fairseq_moe.parallel.placement import DENSE_SHARDS, EXPERT_SHARDS, place, placement_of, shard

__all__ = ["ShardedModel"]


class ShardedModel(nn.Module):
    """Wrap a model with experts so that states are sharded, in the place of stock's data-parallel wrappers.

    Attributes that it lacks are the model's. Under ZeRO-1 parameters are gathered once per update, and under both
    kinds the gradients of micro-batches add up on each rank and are reduced once, in the order of stock's legacy_ddp,
    which gives the same sums.

    Args:
        module: the whole model, on its device and in its precision.
        decoder: of the model.
        group: data and context ranks.
        kind: what is sharded.

    Attributes:
        shards: of the parameters that are sharded, by name.
    """

    def __init__(self, module: nn.Module, decoder: MoEDecoder, group: Any, kind: Sharding) -> None:
        super().__init__()
        self.module = module
        self._kind = kind
        self._passes_left: int | None = None
        self._layers = _layers_of(decoder)
        placements = {name: placement_of(p) for name, p in module.named_parameters()}
        _shard_modules(module, decoder, group, kind)
        self.shards: dict[str, ParameterShard] = {}
        for name, parameter in module.named_parameters():

            def mark(local: nn.Parameter, name: str = name) -> None:
                place([local], placements[name])
                shard(local)

            found = shard_of(parameter, mark)
            if found is not None:
                self.shards[name] = found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the model does."""
        if self.training and self._passes_left is not None:
            self._passes_left -= 1
            self._set_sync(self._passes_left == 0)
        return self.module(*args, **kwargs)

    def begin_update(self, num_passes: int) -> None:
        """Reduce gradients after the last of so many training passes, in place of stock, which would do it.

        Stock asks for ``no_sync`` only where there is more than one data rank.
        """
        self._passes_left = num_passes

    def __getattr__(self, name: str) -> Any:
        """Find what the wrapper lacks in the model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """List this rank's parts of the parameters, plain ones, under the model's names."""
        for name, parameter in self.module.named_parameters(*args, **kwargs):
            yield name, self.shards[name].local if name in self.shards else parameter

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let the gradients of backward passes inside add up on each rank, to be reduced by the next one after."""
        self._set_sync(False)
        try:
            yield
        finally:
            self._set_sync(True)

    def reduce_in_next_backward(
        self, layers: Iterable[nn.Module], *, of_layers: bool, of_others: bool
    ) -> None:
        """Choose what the next backward pass of a pipeline's stage reduces, in place of ``no_sync``.

        Args:
            layers: those that it passes.
            of_layers: their gradients, because no further micro-batch passes them.
            of_others: those of everything outside of layers, because it is the last pass.
        """
        keeps_gathered = self._kind is Sharding.OPTIMIZER
        set_gradient_sync(self.module, of_others, keeps_gathered=keeps_gathered, left_alone=self._layers)
        for layer in layers:
            set_gradient_sync(layer, of_layers, keeps_gathered=keeps_gathered)

    def _set_sync(self, is_on: bool) -> None:
        set_gradient_sync(self.module, is_on, keeps_gathered=self._kind is Sharding.OPTIMIZER)

    def all_reduce_grads(self) -> None:
        """Hand the gradients, which the backward pass has averaged, to the parameters that the optimizer steps."""
        for found in self.shards.values():
            found.take_gradient()

    def free_gathered(self) -> None:
        """Free gathered parameters, so that the next pass gathers them as they are then."""
        free_gathered(self.module)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load whole tensors as the model does, each rank its parts; tied ones under each of their names."""
        self.free_gathered()
        by_id = {id(found.sharded): found for found in self.shards.values()}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            found = by_id.get(id(parameter))
            # A tensor of another shape is the model's to refuse.
            if found is not None and name in state_dict and state_dict[name].shape == found.shape:
                state_dict[name] = found.sharded_like(state_dict[name])
        return self.module.load_state_dict(state_dict, *args, **kwargs)


def _shard_modules(module: nn.Module, decoder: MoEDecoder, group: Any, kind: Sharding) -> None:
    assert decoder.mesh is not None
    frees, ranks = kind is Sharding.ALL, decoder.mesh.ranks
    experts = [child for child in decoder.modules() if isinstance(child, Experts)]
    replicas = decoder.mesh.expert_shards
    left_alone: list[nn.Parameter] = []
    for stack in experts:
        if replicas is not None and ranks.size(EXPERT_SHARDS) > 1:
            shard_module(stack, replicas, frees_after_forward=frees)
        else:
            left_alone += stack.parameters()
    if ranks.size(DENSE_SHARDS) == 1:
        return
    for layer in _layers_of(decoder):
        shard_module(layer, group, frees_after_forward=frees, left_alone=left_alone)
    shard_module(module, group, frees_after_forward=frees, left_alone=left_alone)


def _layers_of(decoder: MoEDecoder) -> list[nn.Module]:
    """List this rank's layers and blocks that guess further."""
    return [*(layer for layer in decoder.layers if layer is not None), *getattr(decoder, "mtp", ())]
