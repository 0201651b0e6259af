"""Open a checkpoint of any kind, found out by looking at it; its tensors are read when they are used."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_moe.checkpoint import (
    MANIFEST_KEY,
    BranchCheckpoint,
    Checkpoint,
    LazyTensor,
    ModelShape,
    ShardContent,
    ShardEntry,
    damage_as_sentence,
    find_aliases,
    find_branch_checkpoint,
    load_plain,
    name_intact,
    newest_intact,
    shard_problem,
)
from fairseq_moe.checkpoint.branch import ExpertRows
from fairseq_moe.checkpoint.groups import hyperparameters
from fairseq_moe.errors import CheckpointError
from fairseq_moe.stock.checkpoint.main_state import model_shape

__all__ = ["Source", "open_source"]

Advance = Callable[[int], None]


@dataclass(kw_only=True)
class Source:
    """An opened checkpoint of any kind: ours, the moe branch's or a dense one.

    Args:
        path: of the main file (of the moe branch: the shared file).
        kind: what it is, in words.
        state: what the main file holds besides tensors.
        files: all files, the main file first.
        update: optimizer updates done; None if it does not say.
        run_id: of the training run, in our format.
        set_id: names the save: two main files with the same one are copies of each other.
        shape: of the model; None for a dense one.
        entries: the shards as its manifest lists them; none for other kinds than ours.
        content_of: everything, with the given experts, and with optimizer state or without.
    """

    path: Path
    kind: str
    state: dict[str, Any]
    files: list[Path]
    update: int | None
    run_id: str | None = None
    set_id: str
    shape: ModelShape | None
    entries: list[ShardEntry]
    content_of: Callable[[Sequence[int], bool], ShardContent]
    checkpoint: Checkpoint | None = None

    @property
    def num_bytes(self) -> int:
        """Add up the sizes of all files that are there."""
        return sum(file.stat().st_size for file in self.files if file.is_file())

    @property
    def unverified_bytes(self) -> int:
        """Add up the sizes of the files that ``problems`` compares; the main file was checked when it was opened."""
        return sum(entry.num_bytes for entry in self.entries)

    def content(self, expert_ids: Sequence[int] | None = None, *, with_optimizer: bool) -> ShardContent:
        """Collect all tensors, to be read when they are used.

        Args:
            expert_ids: global ids, in this order (None: all).
            with_optimizer: optimizer state too.

        Raises:
            CheckpointError: files do not fit together.
        """
        with damage_as_sentence(self.path):
            every = range(self.shape.num_experts if self.shape is not None else 0)
            return self.content_of(every if expert_ids is None else expert_ids, with_optimizer)

    def problems(self, advance: Advance) -> Iterator[str]:
        """Compare all files with their digests; one sentence for each that is not as it was written.

        Args:
            advance: told the number of bytes that have been compared.
        """
        damaged = False
        if self.checkpoint is not None:
            for entry in self.entries:
                found = shard_problem(self.path, self.checkpoint.manifest, entry)
                advance(entry.num_bytes)
                if found is not None:
                    damaged = True
                    yield found
        if damaged:
            return
        try:  # the branch's rank files are compared with their CRCs here
            self.content(with_optimizer=self.checkpoint is not None)
        except CheckpointError as error:
            yield str(error)

    def require_intact(self, advance: Advance) -> None:
        """Raise an error with the first problem, which also names the newest intact checkpoint beside this one.

        Copying what is damaged would give it digests of its own.
        """
        found = next(self.problems(advance), None)
        if found is not None:
            raise CheckpointError(found + name_intact(newest_intact(self.path.parent)))


def open_source(path: Path) -> Source:
    """Open a checkpoint, whatever kind it is.

    Raises:
        CheckpointError: it is no checkpoint, or damaged.
    """
    if path.is_dir():
        names = ", ".join(sorted(file.name for file in path.glob("*.pt"))[:8]) or "none"
        raise CheckpointError(f"{path} is a directory; give one of its checkpoints (found: {names}).")
    branch = find_branch_checkpoint(path)
    with damage_as_sentence(path):
        if branch is not None and (path in (branch.shared, *branch.rank_files) or not path.is_file()):
            return _open_branch(branch)
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist; give the path of a checkpoint's main file (.pt).")
        state = load_plain(path, lazily=True)
        return _open_ours(path, state) if MANIFEST_KEY in state else _open_dense(path, state)


def _open_ours(path: Path, state: dict[str, Any]) -> Source:
    checkpoint = Checkpoint.from_state(path, state)
    manifest = checkpoint.manifest
    return Source(
        path=path,
        kind=f"MoE checkpoint of fairseq_moe, format {manifest.version}",
        state=state,
        files=[path, *(path.parent / entry.file for entry in manifest.shards)],
        update=manifest.update,
        run_id=manifest.run_id,
        set_id=manifest.set_dir,
        shape=manifest.shape,
        entries=manifest.shards,
        content_of=lambda ids, with_optimizer: checkpoint.content(
            expert_ids=ids, with_optimizer=with_optimizer
        ),
        checkpoint=checkpoint,
    )


def _open_branch(branch: BranchCheckpoint) -> Source:
    state = load_plain(branch.shared, lazily=True)
    shape = model_shape(state["cfg"]["model"])
    saved = state.get("last_optimizer_state")
    groups = None
    if saved is not None:
        groups = {name: value for name, value in saved.items() if name != "state"}
        groups["param_groups"] = hyperparameters(saved["param_groups"])
    # All experts at once, however few are asked for: each file is checked as a whole and then mapped, not read.
    rows = partial(
        branch.expert_rows, num_experts=shape.num_experts, expert_ids=range(shape.num_experts), lazily=True
    )
    return Source(
        path=branch.shared,
        kind="MoE checkpoint of fairseq's moe branch",
        state={**state, "model": {}, "last_optimizer_state": groups},
        files=[branch.shared, *branch.rank_files],
        update=_update(state),
        set_id=str(branch.shared.resolve()),
        shape=shape,
        entries=[],
        content_of=partial(_branch_content, branch, cache(rows), state),
    )


def _branch_content(
    branch: BranchCheckpoint,
    rows_of: Callable[..., ExpertRows],
    state: dict[str, Any],
    expert_ids: Sequence[int],
    with_optimizer: bool,
) -> ShardContent:
    named = dict(state)
    dense_optimizer = branch.adopt_dense(named, with_optimizer=with_optimizer)
    content = _dense_content(named["model"], dense_optimizer)
    content.expert_ids = list(expert_ids)
    if not content.expert_ids:
        return content
    model, optimizer = rows_of(with_optimizer=with_optimizer)
    for name, rows in model.items():
        content.model[name] = _stack_tensors([rows[expert] for expert in expert_ids])
    for name, values in optimizer.items():
        content.optimizer[name] = {
            key: _stack([rows[expert] for expert in expert_ids]) for key, rows in values.items()
        }
    return content


def _stack(rows: list[Any]) -> Any:
    """Stack rows of experts into one tensor; of numbers, such as Adam's step, take the first: they are all the same."""
    return _stack_tensors(rows) if isinstance(rows[0], Tensor) else rows[0]


def _stack_tensors(rows: list[Tensor]) -> LazyTensor:
    first = rows[0]
    if not all(isinstance(row, Tensor) and row.shape == first.shape for row in rows):
        raise TypeError("experts that are no tensors of one shape")
    return LazyTensor(
        dtype=first.dtype, shape=(len(rows), *first.shape), load=lambda: torch.stack(rows).to(first.dtype)
    )


def _open_dense(path: Path, state: dict[str, Any]) -> Source:
    model = state.get("model")
    if not isinstance(model, dict) or not all(isinstance(value, Tensor) for value in model.values()):
        raise CheckpointError(f"{path} holds no model; expected a checkpoint of fairseq.")
    return Source(
        path=path,
        kind="dense checkpoint of fairseq",
        state={**state, "model": {}},
        files=[path],
        update=_update(state),
        set_id=str(path.resolve()),
        shape=None,
        entries=[],
        content_of=lambda ids, with_optimizer: _dense_content(model, {}),
    )


def _dense_content(model: Mapping[str, Tensor], optimizer: dict[str, dict[str, Any]]) -> ShardContent:
    aliases = find_aliases(model)
    return ShardContent(
        model={name: _lazy(tensor) for name, tensor in model.items() if name not in aliases},
        optimizer={
            name: {key: _lazy(value) if isinstance(value, Tensor) else value for key, value in values.items()}
            for name, values in optimizer.items()
        },
        aliases=aliases,
    )


def _lazy(tensor: Tensor) -> LazyTensor:
    return LazyTensor(dtype=tensor.dtype, shape=tuple(tensor.shape), load=lambda: tensor)


def _update(state: Mapping[str, Any]) -> int | None:
    history = state.get("optimizer_history") or [{}]
    update = history[-1].get("num_updates")
    return update if isinstance(update, int) else None
