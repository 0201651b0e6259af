"""Write a whole checkpoint into a directory, find the newest one that is intact, delete sets of shards without one."""

import logging
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fairseq_moe.checkpoint.files import TEMPORARY, load_plain, write_plain
from fairseq_moe.checkpoint.manifest import MANIFEST_KEY, Manifest, ModelShape, ShardEntry
from fairseq_moe.checkpoint.reader import Checkpoint
from fairseq_moe.checkpoint.shards import SETS_DIR, SetId, ShardContent, write_shard
from fairseq_moe.errors import CheckpointError
from fairseq_moe.faults import fault

__all__ = ["commit_main", "name_intact", "newest_intact", "prune_sets", "remove_set", "write_checkpoint"]

logger = logging.getLogger(__name__)


def write_checkpoint(
    path: Path,
    *,
    state: dict[str, Any],
    run_id: str | None,
    update: int,
    shape: ModelShape,
    contents: Iterable[ShardContent],
    num_shards: int,
) -> Manifest:
    """Write a complete checkpoint from one process, tensor by tensor: the shards, then the main file.

    ``write_checkpoint(target, state=c.state, run_id=c.manifest.run_id, update=c.manifest.update,
    shape=c.manifest.shape, contents=c.split(n), num_shards=n)`` gives a ``Checkpoint`` c another number of
    shards.

    Args:
        path: of the main file.
        state: what the main file holds besides the manifest and tensors.
        run_id: of the training run (None: a new one).
        update: optimizer updates done.
        shape: of the model.
        contents: of each shard, in order; together every tensor once.
        num_shards: how many they are.

    Raises:
        OSError: a file cannot be written; then there is no trace of the checkpoint.
        CheckpointError: the content cannot be stored in this format.
    """
    set_id = SetId.new(run_id=run_id, update=update)
    try:
        entries = [
            write_shard(path.parent, set_id, index=index, num_shards=num_shards, content=content)
            for index, content in enumerate(contents)
        ]
        return commit_main(path, state=state, set_id=set_id, shape=shape, entries=entries)
    except BaseException:
        remove_set(path.parent, set_id)
        raise


def commit_main(
    path: Path, *, state: dict[str, Any], set_id: SetId, shape: ModelShape, entries: list[ShardEntry]
) -> Manifest:
    """Write the main file of a set whose shards are all written: from then on the checkpoint exists.

    Args:
        path: of the main file.
        state: what it holds besides the manifest; ``model`` becomes empty.
        set_id: of the set.
        shape: of the model.
        entries: what ``write_shard`` returned for each shard.

    Raises:
        OSError: it cannot be written; what was at ``path`` before is still there.
        CheckpointError: the shards do not hold each expert once.
    """
    manifest = Manifest(run_id=set_id.run_id, update=set_id.update, shape=shape, shards=entries)
    Manifest.from_dict(manifest.to_dict(), source=path)
    write_plain(path, {**state, "model": {}, MANIFEST_KEY: manifest.to_dict()})
    return manifest


def remove_set(directory: Path, set_id: SetId) -> None:
    """Delete the shards of a set that did not become complete."""
    shutil.rmtree(directory / SETS_DIR / set_id.name, ignore_errors=True)


def newest_intact(directory: Path) -> Path | None:
    """Find the checkpoint with the most updates of which every byte is as it was written; returns its main file.

    Reads whole checkpoints, newest first, until one is intact. Dense checkpoints do not count.
    """
    found = []
    for path in sorted(directory.glob("*.pt")):
        try:
            checkpoint = Checkpoint.open(path)
        except CheckpointError:
            continue
        found.append((checkpoint.manifest.update, path.stat().st_mtime_ns, checkpoint))
    for _, _, checkpoint in sorted(found, key=lambda entry: entry[:2], reverse=True):
        try:
            checkpoint.verify()
        except CheckpointError:
            continue
        return checkpoint.path
    return None


def name_intact(intact: Path | None) -> str:
    """Write the sentence that an error ends with where ``newest_intact`` has found a checkpoint; else nothing."""
    return "" if intact is None else f" The newest intact checkpoint there is {intact}."


def prune_sets(directory: Path, *, committed: Path) -> None:
    """Delete what earlier saves have left and no main file names, after a save that succeeded.

    A set, or a temporary file of a writer that was killed, goes when it is older than the main file just
    written and no main file in ``directory`` names it. If any main file cannot be read, nothing goes: it
    might name any of them.

    Args:
        directory: of the main files.
        committed: the main file just written.
    """
    now_ns = committed.stat().st_mtime_ns
    fault("save.before_prune")
    try:
        named = set(_named_sets(directory))
    except CheckpointError as error:
        logger.warning("Old shards are kept, because a main file might name them: %s", error)
        return
    for path in (directory / SETS_DIR).glob("*"):
        if path.is_dir() and path not in named and _newest_ns(path) < now_ns:
            shutil.rmtree(path, ignore_errors=True)
            fault("save.pruned_one")
    for path in directory.glob(f"*.pt{TEMPORARY}*"):
        if path.stat().st_mtime_ns < now_ns:
            path.unlink(missing_ok=True)


def _named_sets(directory: Path) -> Iterator[Path]:
    for main in directory.glob("*.pt"):
        state = load_plain(main, lazily=True)
        if MANIFEST_KEY in state:
            yield directory / Manifest.from_dict(state[MANIFEST_KEY], source=main).set_dir


def _newest_ns(directory: Path) -> int:
    return max(path.stat().st_mtime_ns for path in (directory, *directory.glob("*")))
