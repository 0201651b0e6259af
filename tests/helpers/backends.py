"""Name the ways to hold parameters and optimizer states over ranks by the flags that ask for them."""

__all__ = ["AXES", "BACKENDS", "PIPELINES", "ZERO"]

BACKENDS = {
    "legacy_ddp": ["--ddp-backend", "legacy_ddp"],
    "pytorch_ddp": ["--ddp-backend", "pytorch_ddp"],
    "fully_sharded": ["--ddp-backend", "fully_sharded"],
    "zero1": ["--use-distributed-optimizer"],
    "zero3": ["--use-torch-fsdp2"],
}
# Ranks that share micro-batches: each two neighbours.
AXES = {
    "T2": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "C2": ["--context-parallel-size", "2"],
}
# Those whose ranks hold other layers: half a run's ranks the first ones, and the other half the last.
PIPELINES = {
    "P2": ["--pipeline-model-parallel-size", "2"],
}
ZERO = ["zero1", "zero3"]  # those sharded by torch's fully_shard
