"""The losses of a router in the sum convention: number of tokens times loss, added over micro-batches."""

import pytest
import torch
from torch import Tensor

from fairseq_moe.modules import (
    Router,
    RouterMode,
    TokenInfo,
)
from fairseq_moe.modules.routing.capacity import DropPolicy
from fairseq_moe.modules.routing.scores import ScoreFunction, ScoreRule
from fairseq_moe.modules.routing.topk import CapacityConfig
from tests.helpers import slow_routing as slow
from tests.helpers.routers import EVAL, SIGN, TRAIN, E, balanced_logits, make_router, router_of, tokens

# --- losses in the sum convention: number of tokens times loss, added over micro-batches ---


def sums(router: Router, parts: list[Tensor], sequences: int = 1) -> dict[str, Tensor]:
    """What the criterion would add up, with coefficients of 1."""
    router.begin_update()
    total: dict[str, Tensor] = {}
    for x in parts:
        info = TokenInfo(mode=RouterMode.TRAIN, num_sequences=len(x) // 6 if sequences else 1)
        for name, loss in router(x, tokens=info).losses.items():
            total[name] = total.get(name, torch.zeros(())) + len(x) * loss
    return total


def test_aux_is_the_same_for_any_placement_of_the_same_micro_batches() -> None:
    router = make_router(losses={"aux"})
    parts = [tokens(size, seed) for seed, size in enumerate((6, 12, 18))]
    together = sums(router, parts)["aux"]
    ranks = sums(router, parts[:1])["aux"] + sums(router, parts[1:])["aux"]
    torch.testing.assert_close(ranks, together)
    torch.testing.assert_close(sums(router, parts[::-1])["aux"], together)


@pytest.mark.parametrize("name", ["seq_aux", "z"])
def test_sequence_and_z_losses_are_the_same_for_any_split(name: str) -> None:
    router = make_router(losses={name})
    x = tokens(36)
    whole = sums(router, [x])[name]
    gradient = torch.autograd.grad(whole, router.weight)[0]
    for sizes in ([6] * 6, [12, 24], [18, 6, 12]):
        parts = sums(router, list(x.split(sizes)))[name]
        torch.testing.assert_close(parts, whole)
        torch.testing.assert_close(torch.autograd.grad(parts, router.weight)[0], gradient)


def test_sequence_loss_of_one_sequence_is_the_aux_loss() -> None:
    found = make_router(losses={"aux", "seq_aux"})(tokens(), tokens=TRAIN).losses
    torch.testing.assert_close(found["seq_aux"], found["aux"])


@pytest.mark.parametrize("function", list(ScoreFunction))
def test_global_loss_counts_all_of_the_update_so_far(function: ScoreFunction) -> None:
    router = make_router(score=ScoreRule(top_k=2, function=function), losses={"aux", "global_aux"})
    parts = [tokens(size, seed) for seed, size in enumerate((6, 12, 18))]
    for _ in range(2):  # the second update starts anew
        router.begin_update()
        running = [0] * E
        for x in parts:
            found = router(x, tokens=TRAIN).losses
            logits = (x @ router.weight.t()).detach()
            own = [0] * E
            for row in logits.topk(2).indices.tolist():
                for expert in row:
                    own[expert] += 1
            running = [so_far + new for so_far, new in zip(running, own, strict=True)]
            for name, counts in (("aux", own), ("global_aux", running)):
                expected = slow.load_balancing_loss(logits, counts, function=function.value)
                assert float(found[name].detach()) == pytest.approx(expected, rel=1e-5)
    evaluated = router(parts[0], tokens=EVAL).losses  # by its own counts, and nothing is remembered
    torch.testing.assert_close(evaluated["global_aux"], evaluated["aux"])
    assert router.global_counts_E.tolist() == running


def test_uniform_counts_give_one_whatever_the_scores() -> None:
    rows = torch.arange(1, 9).unsqueeze(1)
    level = balanced_logits() - torch.tensor([1.0625, 0.5, 0.0, -1.03125])  # every expert is chosen 4 times
    router, x = router_of(level * rows, losses={"aux"})
    found = router(x, tokens=TRAIN)
    assert torch.bincount(found.decision.expert_ids_TK.reshape(-1)).tolist() == [4, 4, 4, 4]
    assert found.gates_TE.mean(0).std() > 0.01
    torch.testing.assert_close(found.losses["aux"], torch.tensor(1.0))


def test_losses_ignore_bias_groups_and_drops() -> None:
    plain = make_router(losses={"aux", "seq_aux"})(tokens(), tokens=TRAIN).losses
    score = ScoreRule(top_k=2, function=ScoreFunction.SIGMOID, num_groups=2, group_topk=1)
    capacity = CapacityConfig(factor=0.5, policy=DropPolicy.POSITION)
    router = make_router(losses={"aux", "seq_aux"}, score=score, capacity=capacity, bias=SIGN)
    router.expert_bias += torch.tensor([1.0, -1.0, 0.5, 0.0])
    found = router(tokens(), tokens=TRAIN).losses
    for name, loss in plain.items():
        torch.testing.assert_close(found[name], loss)


def test_losses_reach_the_router_without_any_other_gradient() -> None:
    for name in ("aux", "seq_aux", "global_aux", "z"):
        router = make_router(losses={name})
        router(tokens(), tokens=TRAIN).losses[name].backward()
        assert router.weight.grad is not None and router.weight.grad.abs().sum() > 0, name
