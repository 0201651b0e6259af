"""Mistakes with tensor and context ranks that losses alone would hide: one update beside one process sees each.

Run with ``pytest tests/distributed/test_axes_mutations.py``.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.axes import C2, C2T2, GPT, T2, T2X2, numbers_of_ranks
from tests.helpers.complaint import complaint
from tests.helpers.ranks import run_ranks

Patch = pytest.MonkeyPatch
MODEL = (*GPT, "--moe-z-loss-coeff", 0.1, "--use-moe-pad-mask", "false")


def router_summed_over_too_few(patch: Patch, decoder: Any) -> None:
    groups = decoder.mesh.groups_by_axes
    patch.setitem(groups, ("data", "context", "tensor"), groups["data", "context"])


def bias_of_every_part(patch: Patch, decoder: Any) -> None:
    from fairseq_moe.modules import Experts

    for module in decoder.modules():
        if isinstance(module, Experts):
            module.part = (0, module.part[1])


def statistics_averaged(patch: Patch, decoder: Any) -> None:
    """Each rank makes statistics of its own counts; all log their mean."""
    from dataclasses import replace

    import fairseq_moe.criterions.moe_cross_entropy as criterion
    from fairseq_moe.modules import MoELayer

    stock_aux, stock_stats, shards = MoELayer._aux, criterion.layer_stats, decoder.shards

    def own(self: Any, routed: Any) -> Any:
        return stock_aux(self, routed._replace(decision=replace(routed.decision, micro_batch=None)))

    patch.setattr(MoELayer, "_aux", own)
    count = shards.context * shards.tensor
    patch.setattr(criterion, "layer_stats", lambda *args: shards.total(stock_stats(*args)) / count)


def padding_row_with_a_gradient(patch: Patch, decoder: Any) -> None:
    from fairseq_moe.models.sharded_decoder import ShardedDecoder

    patch.setattr(ShardedDecoder, "_padding_row", None)


def padding_embedded_as_zeros(patch: Patch, decoder: Any) -> None:
    from fairseq_moe.models.sharded_decoder import ShardedDecoder

    stock = ShardedDecoder._own_words

    def zeros(self: Any, ids_BS: Tensor) -> Tensor:
        return stock(self, ids_BS).masked_fill(ids_BS.eq(decoder.padding_idx).unsqueeze(-1), 0.0)

    patch.setattr(ShardedDecoder, "_own_words", zeros)


def absent_positions_routed(patch: Patch, decoder: Any) -> None:
    from fairseq_moe.modules.shards import SequencePart

    patch.setattr(SequencePart, "num_present", property(lambda part: part.num_own))


def chunks_in_another_order(patch: Patch, decoder: Any) -> None:
    from fairseq_moe.modules.shards import SequencePart

    patch.setattr(SequencePart, "in_order", lambda part, gathered, *, dim: torch.cat(gathered, dim))


def shares_not_added_up(patch: Patch, decoder: Any) -> None:
    """The balance loss of a rank is its share alone."""
    from fairseq_moe.distributed.sequence import GroupShards

    patch.setattr(GroupShards, "total", lambda self, shares: shares)


def nothing(patch: Patch, decoder: Any) -> None:
    pass


MUTATIONS: dict[str, Callable[[Patch, Any], None]] = {
    mutate.__name__.replace("_", " "): mutate
    for mutate in (
        nothing,
        router_summed_over_too_few,
        bias_of_every_part,
        statistics_averaged,
        padding_row_with_a_gradient,
        padding_embedded_as_zeros,
        absent_positions_routed,
        chunks_in_another_order,
        shares_not_added_up,
    )
}
# What is wrong with each, on which layouts: words of the complaint.
CASES: dict[int, dict[str, tuple[tuple[Any, ...], list[str]]]] = {
    2: {
        "T2": (
            T2,
            ["router summed over too few", "padding row with a gradient", "padding embedded as zeros"],
        ),
        "T2X2": (T2X2, ["bias of every part", "shares not added up"]),
        "C2": (C2, ["chunks in another order", "absent positions routed", "statistics averaged"]),
    },
    4: {
        "C2T2": (
            C2T2,
            [name for name in MUTATIONS if name not in ("bias of every part", "nothing")],
        ),
    },
}
SEEN_IN = {
    "router summed over too few": "differ between ranks",
    "bias of every part": "logged",
    "statistics averaged": "logged",
    "padding row with a gradient": "gradient of decoder.embed_tokens.weight",
    "padding embedded as zeros": "logged",
    "absent positions routed": "logged",
    "chunks in another order": "logged",
    "shares not added up": "logged",
}


def updated(rank: int, cases: list[tuple[tuple[Any, ...], str]]) -> list[Any]:
    """One update of each case after one without its mutation, so that no gradient is zero by chance."""
    from fairseq_moe.errors import RanksDisagreeError
    from tests.helpers.tiny import build_trainer, gradients, make_batch, update

    found: list[Any] = []
    for flags, mutation in cases:
        trainer = build_trainer([*MODEL, *flags], dtype=torch.float64)
        batches = [make_batch(number, length=length, num_padded=2) for number, length in enumerate((13, 5))]
        update(trainer, batches)
        decoder = trainer.get_model().decoder
        with pytest.MonkeyPatch.context() as patch:
            MUTATIONS[mutation](patch, decoder)
            try:
                logged = numbers_of_ranks(update(trainer, batches))
                found.append({"logged": logged, "gradients": gradients(trainer)})
            except (RanksDisagreeError, AssertionError) as error:
                found.append(str(error))
    return found


@functools.cache
def alone() -> dict[str, Any]:
    found: dict[str, Any] = run_ranks(updated, 1, [((), "nothing")])[0][0]
    return found


@pytest.mark.parametrize("world_size", CASES)
def test_each_mistake_is_seen(world_size: int) -> None:
    cases = [
        (flags, mutation)
        for flags, mutations in CASES[world_size].values()
        for mutation in ("nothing", *mutations)
    ]
    by_rank = run_ranks(updated, world_size, cases, timeout=110)
    for index, (_, mutation) in enumerate(cases):
        for rank, found in enumerate(by_rank):
            said = complaint(found[index], alone())
            if mutation == "nothing":
                assert said == "", (cases[index], rank)
            else:
                assert SEEN_IN[mutation] in said, (cases[index], rank, said)
