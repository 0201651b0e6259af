"""Checkpoints of MoE models: files, digests and layouts. No fairseq, no collectives.

A checkpoint is a main file ``checkpoint*.pt``, which stock fairseq names, copies and deletes, and a set of
expert shards beside it, ``experts/<update>-<id>/shard-<i>-of-<n>.safetensors``. The shards are written first;
the main
file, written last, names them with their sizes and digests, so a main file that exists is complete. Expert
tensors are stored by global expert id and optimizer state by parameter name, so any number of ranks and any
data-parallel backend reads what another wrote.
"""

from fairseq_moe.checkpoint.branch import BranchCheckpoint, find_branch_checkpoint
from fairseq_moe.checkpoint.files import UNREADABLE, load_plain, plain_globals, unreadable, write_plain
from fairseq_moe.checkpoint.manifest import MANIFEST_KEY, Manifest, ShardEntry
from fairseq_moe.checkpoint.sets import prune_sets, read_experts, write_shard

__all__ = [
    "MANIFEST_KEY",
    "UNREADABLE",
    "BranchCheckpoint",
    "Manifest",
    "ShardEntry",
    "find_branch_checkpoint",
    "load_plain",
    "plain_globals",
    "prune_sets",
    "read_experts",
    "unreadable",
    "write_plain",
    "write_shard",
]
