"""The flat parameters of fairscale's FSDP, and the tensors that lie end to end in each."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from fairscale.nn.data_parallel import FullyShardedDataParallel
from torch import Tensor, nn

from fairseq_moe.distributed.sharding import all_gather_flat

__all__ = ["FlatParameter", "buffers", "flat_parameters"]

_WRAPPERS = ("_fsdp_wrapped_module", "_fpw_module")


@dataclass(frozen=True, kw_only=True)
class FlatParameter:
    """Describe several tensors that lie end to end, of which this rank holds one part.

    Args:
        owner: the FSDP instance around it.
        parameter: the part, (N,), padded to the same N on every rank of the owner's group.
        names: of the tensors.
        shapes: of the tensors.
        aliases: further names of some of them (tied weights).
    """

    owner: FullyShardedDataParallel
    parameter: nn.Parameter
    names: list[str]
    shapes: list[torch.Size]
    aliases: dict[str, str]

    def gather(self, shard: Tensor, is_kept: Callable[[str], bool]) -> dict[str, Tensor]:
        """Gather the whole tensors from the shards of all ranks of the owner's group; collective.

        Args:
            shard: (N,), this rank's part of the parameter, or of a state of the optimizer that is laid out alike.
            is_kept: which names this rank keeps.

        Returns:
            the kept tensors by name, on CPU.
        """
        full = shard.detach()
        if self.owner.world_size > 1:
            full = all_gather_flat(full, self.owner.process_group)
        # What lies beyond the last tensor is padding, so that all ranks hold the same N.
        parts = full[: sum(self._numels)].split(self._numels)
        # Copied one by one: a view of the gathered memory would keep all of it, kept or not, until the save is over.
        return {
            name: part.view(shape).to("cpu", copy=True)
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
            if is_kept(name)
        }

    def shard(self, tensors: Iterable[Tensor]) -> Tensor:
        """Lay the tensors end to end and cut out this rank's part, (N,), in fresh memory."""
        full = torch.cat([tensor.reshape(-1) for tensor in tensors])
        size = self.parameter.numel()
        part = full[self.owner.rank * size : (self.owner.rank + 1) * size]
        return F.pad(part, [0, size - part.numel()])

    @property
    def _numels(self) -> list[int]:
        return [shape.numel() for shape in self.shapes]


def flat_parameters(model: nn.Module) -> Iterator[FlatParameter]:
    """List every flat parameter inside ``model``, in the same order on every rank."""
    for path, owner in model.named_modules():
        if not isinstance(owner, FullyShardedDataParallel):
            continue
        for parameter in owner.params:
            infos, shared = parameter._param_infos, parameter._shared_param_infos
            yield FlatParameter(
                owner=owner,
                parameter=parameter,
                names=[_clean(path, module, name) for module, _, name in infos],
                shapes=parameter._param_shapes,
                aliases={
                    _clean(path, to, to_name): _clean(path, source, source_name)
                    for to, source, _, to_name, _, source_name in shared
                },
            )


def buffers(model: nn.Module) -> Iterator[tuple[str, Tensor, FullyShardedDataParallel | None]]:
    """List (name, buffer, the FSDP root) of each buffer that belongs into a checkpoint."""
    root = model if isinstance(model, FullyShardedDataParallel) else None
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield _clean(path, name), buffer, root


def _clean(*path: str) -> str:
    """Join a dotted name and leave the wrappers' parts out."""
    parts = (part for piece in path for part in piece.split("."))
    return ".".join(part for part in parts if part and part not in _WRAPPERS)
