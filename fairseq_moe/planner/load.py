"""Simulate the exchange of a layer's rows under a load that was recorded: who gets most, and what leaves its node.

The share of each expert is that of the record; every rank's tokens choose alike. Ranks are those of the plan, however
many: a thousand are numbers in a table, no processes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fairseq_moe.errors import ConfigError
from fairseq_moe.expert_load.summary import LayerLoad
from fairseq_moe.planner.mapping import Mapping
from fairseq_moe.planner.shape import ModelShape

__all__ = ["LayerExchange", "exchange_of_layer", "exchanges", "load_lines"]


@dataclass(frozen=True, kw_only=True)
class LayerExchange:
    """Hold what the exchange of one layer, one way and of one micro-batch, comes to.

    Args:
        layer: decoder layer, from 0.
        mean_bytes: that a rank receives.
        worst_bytes: that the rank with most receives.
        worst_place: its place along the expert axis: it holds experts from ``worst_place`` * L on.
        node_frac: share of all rows that stay in the sender's node.
        slowdown: worst over mean: how much longer than balanced ones the experts of the worst rank take.
        drop_frac: share of assignments that the record says found no place.
    """

    layer: int
    mean_bytes: int
    worst_bytes: int
    worst_place: int
    node_frac: float
    slowdown: float
    drop_frac: float


def exchange_of_layer(
    load: LayerLoad, shape: ModelShape, mapping: Mapping, *, value_bytes: int, ranks_per_node: int
) -> LayerExchange:
    """Spread a layer's recorded load over the ranks of an expert group.

    Args:
        load: of the layer.
        shape: of the model.
        mapping: of the run.
        value_bytes: of a number that travels.
        ranks_per_node: consecutive ranks that share a node.

    Raises:
        ConfigError: the record is of another number of experts.
    """
    if len(load.kept) != shape.num_experts:
        raise ConfigError(
            [
                f"the load record has {len(load.kept)} experts in layer {load.layer}, expected the {shape.num_experts} "
                "that the flags ask for; take the record of such a model."
            ]
        )
    grid = mapping.grid
    own = shape.num_experts // grid.expert
    total = sum(load.kept) or 1
    shares = [sum(load.kept[place * own : (place + 1) * own]) / total for place in range(grid.expert)]
    group = grid.expert * grid.expert_tensor
    rows = (
        mapping.own_tokens * shape.top_k * (1 - load.drop_frac)
    )  # of each sender, to each part of its experts
    width = shape.dim * value_bytes
    worst = max(range(grid.expert), key=lambda place: (shares[place], -place))
    return LayerExchange(
        layer=load.layer,
        mean_bytes=round(rows * group / grid.expert * width),
        worst_bytes=round(rows * group * shares[worst] * width),
        worst_place=worst,
        node_frac=_node_frac(shares, grid.expert, grid.expert_tensor, ranks_per_node),
        slowdown=shares[worst] * grid.expert,
        drop_frac=load.drop_frac,
    )


def _node_frac(shares: Sequence[float], expert: int, parts: int, ranks_per_node: int) -> float:
    """Give the share of rows whose expert lies in the sender's node, over all senders of an expert group."""
    by_node: dict[int, float] = {}
    senders: dict[int, int] = {}
    for place in range(expert):
        for part in range(parts):
            node = (place * parts + part) // ranks_per_node
            by_node[node] = by_node.get(node, 0.0) + shares[place] / parts
            senders[node] = senders.get(node, 0) + 1
    return sum(by_node[node] * senders[node] for node in by_node) / (expert * parts)


def exchanges(
    loads: Iterable[LayerLoad], shape: ModelShape, mapping: Mapping, *, value_bytes: int, ranks_per_node: int
) -> list[LayerExchange]:
    """Simulate every layer of a record."""
    return [
        exchange_of_layer(load, shape, mapping, value_bytes=value_bytes, ranks_per_node=ranks_per_node)
        for load in loads
    ]


def load_lines(found: Sequence[LayerExchange]) -> list[str]:
    """Write a table of layers, and a sentence about the worst."""
    from fairseq_moe.planner.table import bytes_text, text_table

    header = ("layer", "received, mean", "worst rank", "its place", "worst / mean", "in the node", "dropped")
    rows = [
        (
            str(each.layer),
            bytes_text(each.mean_bytes),
            bytes_text(each.worst_bytes),
            str(each.worst_place),
            f"{each.slowdown:.2f}",
            f"{each.node_frac:.0%}",
            f"{each.drop_frac:.1%}",
        )
        for each in found
    ]
    worst = max(found, key=lambda each: each.slowdown)
    return [
        "Rows of one micro-batch, one way, under the recorded load",
        *text_table(header, rows),
        f"The worst is layer {worst.layer}: place {worst.worst_place} of the expert axis gets {worst.slowdown:.2f} "
        "times the mean, and all others wait for it.",
    ]
