"""Which tokens and widths of a micro-batch does a rank have, and how are they joined with those of others?

Letters at the end of a name give its shape:

====== ==========================================================
letter meaning
====== ==========================================================
B      sequences of a batch
S      positions of a sequence, or those of them that the text names
D      model width
N      any width
V      words of this rank
T      tokens of this rank
====== ==========================================================

Tests: tests/unit/modules/test_positions.py, tests/distributed/test_sharded_decoder.py.
"""

from fairseq_moe.modules.shards.contract import LocalShards, Shards
from fairseq_moe.modules.shards.output import ShardedOutput
from fairseq_moe.modules.shards.positions import SequencePart

__all__ = ["LocalShards", "SequencePart", "ShardedOutput", "Shards"]
