"""Copy a checkpoint into another number of shard files."""

from pathlib import Path

from fairseq_moe.checkpoint_tools.output import check_target, write_shards
from fairseq_moe.checkpoint_tools.source import open_source
from fairseq_moe.errors import CheckpointError
from fairseq_moe.progress import progress

__all__ = ["reshard"]


def reshard(path: Path, to: Path, *, num_shards: int, with_optimizer: bool = True) -> None:
    """Copy an MoE checkpoint of any format into one of ours with ``num_shards`` shards.

    Any number of ranks reads any number of shards; this is for storage and transport. Needs memory for the
    largest tensor.

    Args:
        path: of the checkpoint.
        to: main file of the new one.
        num_shards: number of files for tensors.
        with_optimizer: copy optimizer state too.

    Raises:
        CheckpointError: the checkpoint is dense or damaged, the experts do not divide evenly, or ``to`` is
            taken or cannot be written.
    """
    check_target(to)
    source = open_source(path)
    if source.shape is None:
        raise CheckpointError(f"{path} is a {source.kind}: one file, which has no shards; copy it as it is.")
    with progress("verifying", source.unverified_bytes) as advance:
        source.require_intact(advance)
    write_shards(
        to,
        state=source.state if with_optimizer else {**source.state, "last_optimizer_state": None},
        run_id=source.run_id,
        update=source.update,
        shape=source.shape,
        content_of=lambda ids: source.content(ids, with_optimizer=with_optimizer),
        num_shards=num_shards,
    )
