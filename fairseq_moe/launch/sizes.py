"""Count the ranks of a job and the micro-batches of an update."""

from dataclasses import dataclass

from fairseq_moe.launch.layers import Layered

__all__ = ["Sizes", "sizes_of"]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Hold numbers that follow from settings.

    Args:
        on_cpu: whether ranks have no GPU.
        ranks_per_node: processes on each machine.
        num_ranks: W, of all machines.
        num_batch_ranks: TP PP CP, ranks that work on each micro-batch.
        num_data_ranks: DP, rounded down where the other axes do not divide W.
        update_freq: micro-batches of an update on each data rank, rounded down; None without a global batch.
    """

    on_cpu: bool
    ranks_per_node: int
    num_ranks: int
    num_batch_ranks: int
    num_data_ranks: int
    update_freq: int | None


def sizes_of(layered: Layered) -> Sizes:
    """Count ranks and micro-batches; ``checks`` says which numbers do not divide."""
    on_cpu = layered["mode"] == "local" or layered["gpus_per_node"] == 0
    ranks_per_node = layered["ranks_per_node"] or (1 if on_cpu else layered["gpus_per_node"])
    num_ranks = layered["nodes"] * ranks_per_node
    num_batch_ranks = layered["tp"] * layered["pp"] * layered["cp"]
    num_data_ranks = max(1, num_ranks // num_batch_ranks)
    mbs, gbs = layered["mbs"], layered["gbs"]
    return Sizes(
        on_cpu=on_cpu,
        ranks_per_node=ranks_per_node,
        num_ranks=num_ranks,
        num_batch_ranks=num_batch_ranks,
        num_data_ranks=num_data_ranks,
        update_freq=max(1, gbs // (mbs * num_data_ranks)) if mbs and gbs else None,
    )
