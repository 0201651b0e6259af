"""Average the weights of several checkpoints of one model."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fairseq_moe.checkpoint import LazyTensor, ShardContent, find_branch_checkpoint, unreadable
from fairseq_moe.checkpoint_tools.output import check_target, write_dense, write_shards
from fairseq_moe.checkpoint_tools.source import Source, open_source
from fairseq_moe.errors import CheckpointError
from fairseq_moe.progress import progress

__all__ = ["AVERAGED_FROM", "average", "last_checkpoints", "mean_of"]

AVERAGED_FROM = "averaged_from"  # a key of the main file: the names of the checkpoints
_MAX_LISTED = 3


def average(sources: Sequence[Source], to: Path) -> None:
    """Write the mean of all model tensors; there is no optimizer state in it.

    The mean is computed in float64 and stored in float32 (float64 where the tensors are). All else is that of
    the checkpoint with the most updates. Needs memory for the largest tensor of two checkpoints; for dense
    checkpoints, for the result.

    Args:
        sources: at least two; MoE checkpoints of any formats, or dense ones.
        to: main file of the result, which has as many shards as the newest of them.

    Raises:
        CheckpointError: they do not belong to one model, one is given twice or is damaged, or ``to`` is taken
            or cannot be written.
    """
    check_target(to)
    _check_distinct(sources)
    _check_alike(sources)
    for source in sources:
        with progress(f"verifying {source.path.name}", source.unverified_bytes) as advance:
            source.require_intact(advance)
    newest = max(sources, key=lambda source: source.update or 0)
    state = {
        **newest.state,
        "last_optimizer_state": None,
        AVERAGED_FROM: [source.path.name for source in sources],
    }
    if newest.shape is None:
        write_dense(to, state=state, content=_mean_content(sources, ()))
        return
    write_shards(
        to,
        state=state,
        run_id=None,  # no run has been in this state
        update=newest.update,
        shape=newest.shape,
        content_of=lambda ids: _mean_content(sources, ids),
        num_shards=max(1, len(newest.entries)),
    )


def _check_distinct(sources: Sequence[Source]) -> None:
    if len(sources) < 2:
        raise CheckpointError(f"a mean needs at least two checkpoints, got {len(sources)}; give more paths.")
    seen: dict[str, Path] = {}
    for source in sources:
        # A set of shards has a name of its own; other checkpoints are told apart by their paths.
        if source.set_id in seen:
            raise CheckpointError(
                f"{source.path} is the same save as {seen[source.set_id]}, which would count twice; leave one out."
            )
        seen[source.set_id] = source.path


def _check_alike(sources: Sequence[Source]) -> None:
    """Refuse checkpoints whose tensors differ in names or shapes."""
    first, *others = sources
    expected = _shapes(first)
    for other in others:
        found = _shapes(other)
        if expected == found:
            continue
        differing = sorted(name for name in expected | found if expected.get(name) != found.get(name))
        listed = ", ".join(
            f"{name} ({expected.get(name, 'missing')} and {found.get(name, 'missing')})"
            for name in differing[:_MAX_LISTED]
        )
        more = f" and {len(differing) - _MAX_LISTED} more" if len(differing) > _MAX_LISTED else ""
        raise CheckpointError(
            f"{first.path} and {other.path} are of different models: they differ in {listed}{more}; give "
            "checkpoints of one model."
        )


def _shapes(source: Source) -> dict[str, tuple[int, ...]]:
    content = source.content(with_optimizer=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in content.model.items()}
    return shapes | {alias: shapes[name] for alias, name in content.aliases.items()}


def _mean_content(sources: Sequence[Source], expert_ids: Sequence[int]) -> ShardContent:
    contents = [source.content(expert_ids, with_optimizer=False) for source in sources]
    first = contents[0]
    aliases = {name: tied for name, tied in first.aliases.items() if _is_tied(contents, name, tied)}
    names = [*first.model, *(name for name in first.aliases if name not in aliases)]
    return ShardContent(
        expert_ids=list(expert_ids),
        model={name: mean_of([_tensor(content, name) for content in contents], name) for name in names},
        aliases=aliases,
    )


def _is_tied(contents: Sequence[ShardContent], name: str, tied: str) -> bool:
    return all(content.aliases.get(name, name) == content.aliases.get(tied, tied) for content in contents)


def _tensor(content: ShardContent, name: str) -> LazyTensor:
    tensor = content.model[content.aliases.get(name, name)]
    assert isinstance(tensor, LazyTensor)
    return tensor


def mean_of(tensors: Sequence[LazyTensor], name: str) -> LazyTensor:
    """Average tensors, which are read one after the other and summed in float64; the mean is float32 or wider.

    Args:
        tensors: of one shape.
        name: for the error; what is no float must be the same in all of them.
    """
    first = tensors[0]
    if not first.dtype.is_floating_point:
        return LazyTensor(dtype=first.dtype, shape=first.shape, load=lambda: _same(tensors, name))
    dtype = torch.promote_types(first.dtype, torch.float32)

    def load() -> Tensor:
        total = torch.zeros(first.shape, dtype=torch.float64)
        for tensor in tensors:
            total += tensor.load()
        return (total / len(tensors)).to(dtype)

    return LazyTensor(dtype=dtype, shape=first.shape, load=load)


def _same(tensors: Sequence[LazyTensor], name: str) -> Tensor:
    value = tensors[0].load()
    if not all(torch.equal(value, other.load()) for other in tensors[1:]):
        raise CheckpointError(
            f"{name} holds whole numbers ({value.dtype}) that differ between the checkpoints; it has no mean."
        )
    return value


def _modified_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError as error:  # a link to nothing, or a running job has deleted the file
        raise unreadable(path, error) from error


def last_checkpoints(count: int, directory: Path) -> list[Source]:
    """Open the last ``count`` saves of the run in a directory; copies of one save count once, means not at all.

    Raises:
        CheckpointError: there are fewer, they are of several runs, or a file in the directory cannot be read
            (it might be one of them).
    """
    if not directory.is_dir():
        raise CheckpointError(f"--last looks into a directory, and {directory} is none; correct the path.")
    saves: dict[object, Source] = {}
    for path in sorted(directory.glob("checkpoint*.pt"), key=_modified_ns):
        branch = find_branch_checkpoint(path)
        if branch is not None and path in branch.rank_files:
            continue
        source = open_source(path)
        if AVERAGED_FROM not in source.state:
            saves[source.set_id if source.entries else source.update] = source
    newest = sorted(saves.values(), key=lambda source: source.update or 0)[-count:] if count > 0 else []
    if len(newest) < max(count, 2):
        raise CheckpointError(
            f"--last is {count} and {directory} holds {len(saves)} different saves; expected a number from 2 to "
            "that."
        )
    updates = [source.update for source in newest]
    if len({source.run_id for source in newest}) > 1 or len(set(updates)) < len(updates):
        raise CheckpointError(
            f"the last {count} saves in {directory} are not of one run (updates {updates}); give the paths "
            "instead of --last."
        )
    return newest
