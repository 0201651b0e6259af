"""How is a checkpoint laid out on disk, written and read? The format is described in docs/checkpoints.md.

``checkpoint_tools`` answers what one can do with a checkpoint from the command line, ``stock/checkpoint`` how stock's
trainer saves and loads one. Both are built on this folder, which knows neither fairseq nor other ranks: it imports
``errors`` and ``faults``.

A checkpoint is a small main file ``checkpoint*.pt``, which stock fairseq names, copies and deletes, and a set
of shards beside it, ``shards/<update>-<id>/shard-<i>-of-<n>.safetensors``, which hold all tensors: dense ones,
experts and optimizer state, each once. The shards are written first; the main file, written last, names them
with their sizes and digests, so a main file that exists is complete. Tensors lie under the names of the
model, experts under their global ids, so any number of ranks and any data-parallel backend reads what another
wrote.

Reading: ``Checkpoint.open(path)``, then ``verify`` and ``tensor``, ``content`` or ``load``. Writing, from one
process: ``write_checkpoint``; from many: ``write_shard`` each, then ``commit_main`` in one of them. Both take
tensors that are read only when they are written (``LazyTensor``), so that copying needs memory for one.

Why not torch.distributed.checkpoint: its metadata goes through ``pickle.load`` and its byte entries through
``weights_only=False``, so a foreign file can run code; its safetensors writer stores tensors only, one chunk
per name and rank, and has no commit point unless it consolidates, that is, writes everything twice; and it
verifies no content. What it would give is resharding, which rows by expert id and whole dense tensors make a
matter of reading other rows. Later kinds of parallelism fit in the same way: a shard that holds part of a
tensor (FSDP2, tensor parallelism) would say which slice in its metadata, as ``expert_ids`` now says which
rows, and the reader would put slices together as it puts rows together now.

Tests: tests/unit/checkpoint; branch: tests/unit/checkpoint_tools, tests/numerics/test_branch_eval.py; sets:
tests/reliability/test_r26_retention.py; safetensors_bytes: tests/unit/convert/test_convert_files.py.
"""

from fairseq_moe.checkpoint.branch import BranchCheckpoint, find_branch_checkpoint
from fairseq_moe.checkpoint.files import (
    UNREADABLE,
    check_records,
    copy_atomically,
    damage_as_sentence,
    flush_directory,
    load_plain,
    make_directory,
    plain_globals,
    sha256_of,
    unreadable,
    write_atomically,
    write_large,
)
from fairseq_moe.checkpoint.manifest import MANIFEST_KEY, Manifest, ModelShape, ShardEntry
from fairseq_moe.checkpoint.opened import shard_problem
from fairseq_moe.checkpoint.plan import find_aliases, share_of, split_content
from fairseq_moe.checkpoint.reader import Checkpoint
from fairseq_moe.checkpoint.sets import (
    commit_main,
    name_intact,
    newest_intact,
    prune_sets,
    remove_set,
    write_checkpoint,
)
from fairseq_moe.checkpoint.shards import (
    LazyTensor,
    SetId,
    ShardContent,
    has_expert_rows,
    key_of,
    split_key,
    write_shard,
)

__all__ = [
    "MANIFEST_KEY",
    "UNREADABLE",
    "BranchCheckpoint",
    "Checkpoint",
    "LazyTensor",
    "Manifest",
    "ModelShape",
    "SetId",
    "ShardContent",
    "ShardEntry",
    "check_records",
    "commit_main",
    "copy_atomically",
    "damage_as_sentence",
    "find_aliases",
    "find_branch_checkpoint",
    "flush_directory",
    "has_expert_rows",
    "key_of",
    "load_plain",
    "make_directory",
    "name_intact",
    "newest_intact",
    "plain_globals",
    "prune_sets",
    "remove_set",
    "sha256_of",
    "shard_problem",
    "share_of",
    "split_content",
    "split_key",
    "unreadable",
    "write_atomically",
    "write_checkpoint",
    "write_large",
    "write_shard",
]
