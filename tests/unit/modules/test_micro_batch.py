"""Counts and scores of a micro-batch's ranks by hand; with real ranks: tests/distributed/test_shard_losses.py."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fairseq_moe.modules import MoEAux, RouterMode, TokenInfo, whole_auxes
from fairseq_moe.modules.routing.contract import MicroBatch, RoutingDecision
from fairseq_moe.modules.routing.losses import (
    balance_loss,
    load_balancing_loss,
    sequence_balancing_loss,
    z_loss,
)
from fairseq_moe.modules.routing.micro_batch import count_sequences, gather_scores, sum_micro_batch
from fairseq_moe.modules.shards import LocalShards

IDS_TK = torch.tensor([[0, 1], [0, 2], [2, 1], [1, 0], [0, 1], [2, 0]])
PADDING_T = torch.tensor([False, False, True, False, True, True])
TRAIN = TokenInfo(mode=RouterMode.TRAIN, num_sequences=2)


class TwoRanks(LocalShards):
    """This rank is the second of two over context; the other one has what is handed in."""

    context, context_index = 2, 1

    def __init__(self, other: Tensor) -> None:
        self.other = other
        self.sent: list[Tensor] = []

    def sum_counts(self, counts: Tensor) -> Tensor:
        """Add the other rank's counts."""
        self.sent.append(counts)
        return counts + self.other

    def gather_tokens(self, values_TN: Tensor) -> Tensor:
        """Put the other rank's rows first."""
        self.sent.append(values_TN)
        return torch.cat([self.other, values_TN])


def decision_of(ids_TK: Tensor, padding_T: Tensor | None = None) -> RoutingDecision:
    kept_TK = torch.ones_like(ids_TK, dtype=torch.bool)
    if padding_T is not None:
        kept_TK = kept_TK & ~padding_T.unsqueeze(-1)
    return RoutingDecision.counted(
        expert_ids_TK=ids_TK,
        requested_TK=kept_TK,
        kept_TK=kept_TK,
        num_experts=3,
        capacity=None,
        padding_T=padding_T,
    )


def test_sequences_by_hand() -> None:
    counts = count_sequences(IDS_TK, TRAIN, num_experts=3)
    assert counts.choices_BE.tolist() == [[2, 2, 2], [3, 2, 1]]
    assert counts.tokens_B.tolist() == [3, 3]
    counts = count_sequences(IDS_TK, replace(TRAIN, padding_T=PADDING_T), num_experts=3)
    assert counts.choices_BE.tolist() == [[2, 1, 1], [1, 1, 0]]
    assert counts.tokens_B.tolist() == [2, 1]


def test_sequences_of_which_no_token_is_here() -> None:
    counts = count_sequences(IDS_TK[:0], TRAIN, num_experts=3)
    assert counts.choices_BE.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert counts.tokens_B.tolist() == [0, 0]


def test_one_rank_asks_nobody() -> None:
    assert sum_micro_batch(LocalShards(), decision_of(IDS_TK), None) is None
    aux = MoEAux(losses=torch.ones(5), histogram_34E=torch.zeros(3, 4, 3).long(), measures_4=torch.ones(4))
    assert whole_auxes([aux, None], LocalShards()) == [aux, None]
    assert whole_auxes([None, None], TwoRanks(torch.zeros(0))) == [None, None]


@pytest.mark.parametrize("plain", [False, True])
def test_all_counts_are_one_vector(plain: bool) -> None:
    """The other rank says 1 everywhere."""
    decision = decision_of(IDS_TK, PADDING_T)
    sequences = count_sequences(IDS_TK, replace(TRAIN, padding_T=PADDING_T), num_experts=3)
    choices_E = torch.tensor([3, 2, 1]) if plain else None
    shards = TwoRanks(torch.ones((), dtype=torch.int64))
    found = sum_micro_batch(shards, decision, PADDING_T, plain_choices_E=choices_E, sequences=sequences)
    assert found is not None and found.sequences is not None
    assert torch.equal(found.counts.histogram_34E, decision.counts.histogram_34E + 1)
    # By choice (three), kept or dropped: each of the six rows of the other rank's histogram has one more.
    assert found.counts.requested_E.tolist() == (decision.counts.requested_E + 6).tolist()
    assert found.tokens_R.tolist() == [1, 7]  # this rank is the second
    assert int(found.num_valid) == 4
    assert torch.equal(found.sequences.choices_BE, sequences.choices_BE + 1)
    assert torch.equal(found.sequences.tokens_B, sequences.tokens_B + 1)
    assert (found.plain_choices_E is None) is not plain
    if found.plain_choices_E is not None:
        assert found.plain_choices_E.tolist() == [4, 3, 2]
    (sent,) = shards.sent
    assert sent.dtype == torch.int64
    assert len(sent) == 3 * 4 * 3 + 2 + 1 + 3 * plain + 2 * 3 + 2


def test_scores_of_uneven_ranks_are_gathered_with_a_mark() -> None:
    scores_TE = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    other = torch.tensor([[0.5, 0.6, 0.0], [0.7, 0.8, 1.0], [0.9, 1.0, 0.0]])
    shards = TwoRanks(other)
    micro_batch = MicroBatch(
        counts=decision_of(IDS_TK).counts,
        tokens_R=torch.tensor([3, 2]),
        num_valid=torch.tensor(4),
        plain_choices_E=None,
        sequences=None,
    )
    scores, padding = gather_scores(shards, scores_TE, torch.tensor([True, False]), micro_batch)
    assert shards.sent[0].shape == (3, 3)
    assert padding.tolist() == [False, True, False, True, False, True]
    assert torch.equal(scores[:5], torch.cat([other[:, :2], scores_TE]))
    _, padding = gather_scores(shards, scores_TE, None, micro_batch)
    assert padding.tolist() == [False, True, False, False, False, True]
    nobody = micro_batch._replace(tokens_R=torch.tensor([0, 0]))
    _, padding = gather_scores(TwoRanks(other[:0]), scores_TE[:0], None, nobody)
    assert padding.tolist() == [True]  # no collective is of nothing


def test_shares_add_up_to_the_losses() -> None:
    """Tokens 0, 1, 3 and 4 are on one rank, 2 and 5 on the other, in two sequences of three."""
    generator = torch.Generator().manual_seed(0)
    scores_TE = torch.rand(6, 3, generator=generator, dtype=torch.float64).softmax(-1)
    padding_T = torch.tensor([False, False, False, True, False, False])
    whole = count_sequences(IDS_TK, replace(TRAIN, padding_T=padding_T), num_experts=3)
    counts_E, five, six = torch.tensor([4, 3, 3]), torch.tensor(5), torch.tensor(6)

    def losses(rows: list[int], *, share: bool) -> Tensor:
        of, ids, padding = scores_TE[rows], IDS_TK[rows], padding_T[rows]
        return torch.stack(
            [
                balance_loss(of, counts_E, num_tokens=six if share else None),
                load_balancing_loss(of, counts_E, padding_T=padding, num_tokens=five if share else None),
                z_loss(9 * of, padding_T=padding, num_tokens=five if share else None),
                sequence_balancing_loss(
                    of, ids, num_sequences=2, padding_T=padding, whole=whole if share else None
                ),
            ]
        )

    all_rows = list(range(6))
    sums = losses([0, 1, 3, 4], share=True) + losses([2, 5], share=True)
    torch.testing.assert_close(sums, losses(all_rows, share=False), rtol=0, atol=1e-14)
    torch.testing.assert_close(losses(all_rows, share=True), sums, rtol=0, atol=1e-14)
    assert losses([], share=True).tolist() == [0.0] * 4
    mean = (losses([0, 1, 3, 4], share=False) + losses([2, 5], share=False)) / 2
    assert ((mean - sums).abs() > 1e-3)[1:].all()  # of parts, each over its own numbers: another number
