"""How do wrappers that shard or replicate parameters treat experts?"""

from fairseq_moe.stock.sharding import fsdp, wrappers  # noqa: F401  (declare their seams)
