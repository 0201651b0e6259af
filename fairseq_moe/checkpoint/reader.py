"""Read a checkpoint: all of it or any part, for any number of ranks, one tensor at a time.

Reading takes two steps, so that ranks can share the first: ``verify`` compares shards with the digests of the
main file; then tensors are read by name. A reader trusts nothing else of a file: it executes nothing, follows
no link, and safetensors refuses headers that are too long or point outside the file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairseq_moe.checkpoint.files import load_plain
from fairseq_moe.checkpoint.manifest import MANIFEST_KEY, Manifest, ShardEntry
from fairseq_moe.checkpoint.opened import OpenShard, shard_problem
from fairseq_moe.checkpoint.plan import split_content
from fairseq_moe.checkpoint.shards import (
    LazyTensor,
    ShardContent,
    has_expert_rows,
    key_of,
    split_key,
)
from fairseq_moe.errors import CheckpointError

__all__ = ["Checkpoint"]

_MAX_LISTED = 4


class _Place(NamedTuple):
    shard: OpenShard
    key: str


@dataclass
class Checkpoint:
    """A main file and the shards that it names. Opening reads the main file alone.

    Args:
        path: of the main file.
        state: what the main file holds besides the manifest: fairseq's ``cfg``, ``extra_state``,
            ``optimizer_history``, ``last_optimizer_state`` (hyper-parameters of the groups, loss scale), ...
        manifest: its list of shards.

    >>> checkpoint = Checkpoint.open(Path("checkpoint_last.pt"))  # doctest: +SKIP
    >>> checkpoint.verify()  # doctest: +SKIP
    >>> checkpoint.tensor("model/decoder.embed_tokens.weight").load()  # doctest: +SKIP
    """

    path: Path
    state: dict[str, Any]
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Read the main file ``path``; its shards are neither opened nor verified yet.

        Raises:
            CheckpointError: it cannot be read, or is no MoE checkpoint of this package.
        """
        state = load_plain(path)
        if MANIFEST_KEY not in state:
            raise CheckpointError(
                f"{path} names no shards: it is a dense checkpoint or was not written by fairseq_moe."
            )
        return cls.from_state(path, state)

    @classmethod
    def from_state(cls, path: Path, state: dict[str, Any]) -> "Checkpoint":
        """Open a main file that is loaded already; takes the manifest out of ``state``."""
        return cls(path, state, Manifest.from_dict(state.pop(MANIFEST_KEY), source=path))

    # --- step one

    def verify(self, entries: Sequence[ShardEntry] | None = None) -> None:
        """Compare shards with their sizes and digests.

        Args:
            entries: of the manifest (None: all).

        Raises:
            CheckpointError: names every shard that is missing, damaged or of another save, and what is lost.
        """
        wanted = self.manifest.shards if entries is None else entries
        problems = [found for entry in wanted if (found := shard_problem(self.path, self.manifest, entry))]
        if problems:
            more = f" And {len(problems) - _MAX_LISTED} more." if len(problems) > _MAX_LISTED else ""
            raise CheckpointError(" ".join(problems[:_MAX_LISTED]) + more)

    # --- step two

    def keys(self) -> list[str]:
        """List the key of every tensor, ``model/<parameter>`` or ``optimizer/<parameter>/<state>``, aliases too."""
        return sorted(self._places)

    def tensor(self, key: str, expert_ids: Sequence[int] | None = None) -> LazyTensor:
        """Find one tensor, whole; it is read when its ``load`` is called.

        Args:
            key: one of ``keys``.
            expert_ids: rows of an expert tensor, in this order (None: all E). No meaning for other tensors.

        Raises:
            CheckpointError: there is no such tensor.
        """
        places = self._places.get(key)
        if not places:
            raise CheckpointError(f"{self.path} has no tensor {key}.")
        first = places[0]
        shape, dtype = first.shard.shapes[first.key], first.shard.dtypes[first.key]
        if not (has_expert_rows(key) and shape):
            return LazyTensor(dtype=dtype, shape=shape, load=lambda: self._same(key))
        ids = list(range(self.manifest.shape.num_experts) if expert_ids is None else expert_ids)
        shape = (len(ids), *shape[1:])
        return LazyTensor(
            dtype=dtype, shape=shape, load=lambda: self._rows(key, ids, torch.empty(shape, dtype=dtype))
        )

    def scalars(self) -> dict[str, dict[str, Any]]:
        """Merge the shards' optimizer state that is no tensor, by parameter and state name.

        Raises:
            CheckpointError: shards disagree on that of an expert parameter, so it cannot be merged.
        """
        merged: dict[str, dict[str, Any]] = {}
        for shard in self._shards:
            for name, values in shard.scalars.items():
                for state, value in values.items():
                    if merged.setdefault(name, {}).setdefault(state, value) != value:
                        raise self._differs(f"the optimizer state {state} of {name}")
        return merged

    def aliases(self) -> dict[str, str]:
        """Map further names of parameters (tied weights) to the name under which the tensor is stored."""
        return {alias: name for shard in self._shards for alias, name in shard.aliases.items()}

    def content(self, *, expert_ids: Sequence[int], with_optimizer: bool = True) -> ShardContent:
        """Collect all tensors, with these experts' rows, to be read when they are used.

        Args:
            expert_ids: global ids, in this order.
            with_optimizer: optimizer state too.
        """
        content = ShardContent(expert_ids=list(expert_ids), aliases=self.aliases())
        for key in self.keys():
            name, state = split_key(key)
            if state is None and name not in content.aliases:
                content.model[name] = self.tensor(key, expert_ids)
            elif state is not None and with_optimizer:
                content.optimizer.setdefault(name, {})[state] = self.tensor(key, expert_ids)
        if with_optimizer:
            for name, values in self.scalars().items():
                content.optimizer.setdefault(name, {}).update(values)
        return content

    def split(self, num_shards: int, *, with_optimizer: bool = True) -> list[ShardContent]:
        """Divide all tensors over ``num_shards`` shards; see ``split_content``."""
        return split_content(
            lambda expert_ids: self.content(expert_ids=expert_ids, with_optimizer=with_optimizer),
            num_experts=self.manifest.shape.num_experts,
            num_shards=num_shards,
        )

    def load(
        self,
        *,
        expert_ids: Sequence[int],
        with_optimizer: bool,
        is_wanted: Callable[[str], bool] = lambda name: True,
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
        """Read ``content`` into memory: parameters by name, aliases included, and optimizer state by name.

        Args:
            expert_ids: as ``content``.
            with_optimizer: as ``content``.
            is_wanted: the names to read.
        """
        content = self.content(expert_ids=expert_ids, with_optimizer=with_optimizer)
        model = {name: _loaded(tensor) for name, tensor in content.model.items() if is_wanted(name)}
        wanted = {alias: name for alias, name in content.aliases.items() if is_wanted(alias)}
        model |= {
            alias: model[name] if name in model else _loaded(content.model[name])
            for alias, name in wanted.items()
        }
        optimizer = {
            name: {state: _loaded(value) for state, value in values.items()}
            for name, values in content.optimizer.items()
            if is_wanted(name)
        }
        return model, optimizer

    # --- inside

    @cached_property
    def _shards(self) -> list[OpenShard]:
        return [OpenShard.open(self.path, entry) for entry in self.manifest.shards]

    @cached_property
    def _places(self) -> dict[str, list[_Place]]:
        """Find the shards that hold each key: one for a dense tensor, any number for one with expert rows."""
        places: dict[str, list[_Place]] = {}
        for shard in self._shards:
            for key in shard.shapes:
                places.setdefault(key, []).append(_Place(shard, key))
                if len(places[key]) > 1 and not has_expert_rows(key):
                    raise CheckpointError(f"{key} lies in two shards of {shard.path.parent}, expected one.")
                first = places[key][0].shard
                if shard.shapes[key][1:] != first.shapes[key][1:] or shard.dtypes[key] != first.dtypes[key]:
                    raise CheckpointError(
                        f"{key} has different shapes or types in {first.path} and {shard.path}."
                    )
        for alias, name in self.aliases().items():
            places[key_of(alias)] = places[key_of(name)]
        return places

    def _same(self, key: str) -> Tensor:
        """Read a whole tensor, which every shard that has it must have alike."""
        found = [place.shard.tensor(place.key) for place in self._places[key]]
        if not all(torch.equal(found[0], other) for other in found[1:]):
            raise self._differs(key)
        return found[0]

    def _differs(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{what} in {self.path.parent / self.manifest.set_dir} differs between shards and cannot be "
            "merged; resume with as many ranks as wrote it, or pass --reset-optimizer."
        )

    def _rows(self, key: str, ids: list[int], out: Tensor) -> Tensor:
        """Copy the slices of the experts ``ids`` from all shards into ``out``, in that order."""
        position_of = {expert: position for position, expert in enumerate(ids)}
        found = 0
        for shard, stored_key in self._places[key]:
            # A shard lists its experts in the order of its rows, which need not be ours: another layout wrote it.
            here = [i for i, expert in enumerate(shard.expert_ids) if expert in position_of]
            if here:
                # One read of the range that covers them all, not one for each: a layout asks for neighbours.
                first = min(here)
                rows = shard.rows(stored_key, first, max(here) + 1)
                for i in here:
                    out[position_of[shard.expert_ids[i]]] = rows[i - first]
                found += len(here)
        # The manifest says that each expert is in some shard, not that each shard has every tensor of its experts; and
        # ``out`` is uninitialised memory, so a slice that no shard fills would pass for weights.
        if found != len(ids):
            raise CheckpointError(f"{key} of {self.path} has {found} of the experts {ids}.")
        return out


def _loaded(value: Any) -> Any:
    return value.load() if isinstance(value, LazyTensor) else value
