"""What tensor and context ranks do with capacity, random numbers and short sequences, and what a mistake would break.

Run with ``pytest tests/distributed/test_axes_behaviour.py``. Numbers of whole updates: ``test_axes_updates.py``.
"""

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.axes import C2, C2T2, GPT, LATENT, T2
from tests.helpers.ranks import run_ranks
from tests.helpers.slow_routing import keep, routes

# --- Capacity: each shard's experts take what follows from its own tokens.

LENGTH, NUM_SEQUENCES = 13, 3
TOP1 = ("--moe-expert-count", 4, "--moe-top1-expert")
TOP2 = ("--moe-expert-count", 4)
FACTOR = (*GPT, "--batch-size", NUM_SEQUENCES, "--num-experts", 4, "--moe-expert-capacity-factor", 0.8)
RULES: dict[str, tuple[Any, ...]] = {
    "branch, one expert": TOP1,
    "branch, two experts": TOP2,
    "Megatron, probs": FACTOR,
    "Megatron, prioritized": (*FACTOR, "--moe-token-drop-policy", "prioritized"),
}
LAYOUTS = {"T2": (2, T2, 1, 2), "C2": (2, C2, 2, 1), "C2T2": (4, C2T2, 2, 2)}


def routed(rank: int, models: list[tuple[Any, ...]]) -> list[tuple[Tensor, Tensor, Tensor, float]]:
    """The logits, choices and kept choices of the tokens of this rank, and the logged share of dropped ones."""
    from tests.helpers.tiny import build_trainer, make_batch, update

    found = []
    for flags in models:
        trainer = build_trainer(flags, dtype=torch.float64)
        (router,) = trainer.get_model().decoder.routers()
        seen: list[Any] = []
        stock = router.rule.route

        def watch(
            logits_TE: Tensor, *args: Any, stock: Any = stock, seen: list[Any] = seen, **more: Any
        ) -> Any:
            output = stock(logits_TE, *args, **more)
            decision = output.decision
            seen.append((logits_TE.detach(), decision.expert_ids_TK, decision.kept_TK))
            return output

        router.rule.route = watch
        batch = make_batch(5, num_sequences=NUM_SEQUENCES, length=LENGTH)
        logged = update(trainer, [batch])
        (once,) = seen
        found.append((*once, logged["drop_rate"]))
    return found


def positions_of(rank: int, context: int, tensor: int) -> list[int]:
    """By hand: a context rank has two chunks of the sequence, and each of its tensor ranks a part of these."""
    place, part = divmod(rank, tensor)
    own = list(range(math.ceil(LENGTH / tensor) * tensor))
    if context > 1:
        chunk = math.ceil(LENGTH / (2 * context * tensor)) * tensor
        starts = (place * chunk, (2 * context - 1 - place) * chunk)
        own = [start + offset for start in starts for offset in range(chunk)]
    size = len(own) // tensor
    return [position for position in own[part * size : (part + 1) * size] if position < LENGTH]


def kept_by_the_rule(name: str, logits_TE: Tensor) -> list[set[int]]:
    """Which experts keep each token, token by token."""
    num_tokens, num_experts = logits_TE.shape
    if name == "branch, one expert":
        chosen = routes(logits_TE, top_k=1)
        kept = keep(chosen, capacity=math.ceil(num_tokens / num_experts), policy="position")
    elif name == "branch, two experts":
        chosen = routes(logits_TE, top_k=2)
        capacity, taken = 2 * math.ceil(num_tokens / num_experts), [0] * num_experts
        kept = [{} for _ in chosen]
        for choice in range(2):  # all first choices stand before all second ones
            for token, weights in enumerate(chosen):
                expert = list(weights)[choice]
                if taken[expert] < capacity:
                    kept[token][expert] = weights[expert]
                taken[expert] += 1
    else:
        chosen = routes(logits_TE, top_k=2)
        capacity = math.ceil(num_tokens * 2 / num_experts * 0.8)
        kept = keep(chosen, capacity=capacity, policy=name.split(", ")[1])
    return [set(experts) for experts in kept]


@functools.cache
def routed_alone() -> dict[str, Any]:
    return dict(zip(RULES, run_ranks(routed, 1, list(RULES.values()))[0], strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_shard_keeps_what_its_own_tokens_allow(layout: str) -> None:
    world_size, flags, context, tensor = LAYOUTS[layout]
    by_rank = run_ranks(routed, world_size, [(*rule, *flags) for rule in RULES.values()])
    for index, (name, (whole_TE, *_)) in enumerate(routed_alone().items()):
        whole_BSE = whole_TE.view(NUM_SEQUENCES, LENGTH, -1)
        num_kept = num_chosen = num_seen = 0
        for rank, found in enumerate(by_rank):
            logits_TE, ids_TK, kept_TK, drop_rate = found[index]
            own_TE = whole_BSE[:, positions_of(rank, context, tensor)].flatten(0, 1)
            torch.testing.assert_close(logits_TE, own_TE, rtol=1e-12, atol=1e-12)
            kept = [set(row[mask].tolist()) for row, mask in zip(ids_TK, kept_TK, strict=True)]
            assert kept == kept_by_the_rule(name, own_TE)
            assert drop_rate == pytest.approx(found_rate(by_rank, index), rel=1e-6)
            num_kept, num_chosen = num_kept + int(kept_TK.sum()), num_chosen + kept_TK.numel()
            num_seen += len(own_TE)
        assert num_seen == NUM_SEQUENCES * LENGTH
        assert 0 < num_kept < num_chosen
    kept_alone = [int(found[2].sum()) for found in routed_alone().values()]
    kept_here = [sum(int(found[index][2].sum()) for found in by_rank) for index in range(len(RULES))]
    assert kept_here != kept_alone  # so the number of shards matters, as the rule says


def found_rate(by_rank: list[Any], index: int) -> float:
    """The share of choices that are dropped on all ranks together; in per cent."""
    kept = torch.cat([found[index][2].flatten() for found in by_rank])
    return 100 * float((~kept).double().mean())


# --- Random numbers: other masks for other tokens and heads, the same ones in each run and each recomputed pass.

NOISE = ("--dropout", 0.3, "--attention-dropout", 0.2, "--activation-dropout", 0.2)
NOISY = (*GPT, *NOISE, "--moe-input-jitter-eps", 0.1)
NOISY_BLOCKS = (*LATENT, *NOISE, "--moe-input-jitter-eps", 0.1)
RUNS = {
    "plain": NOISY,
    "again": NOISY,
    "recomputed": (*NOISY, "--checkpoint-activations"),
    "recomputed experts": (*NOISY, "--moe-layer-recompute"),
    "blocks": NOISY_BLOCKS,
    "recomputed blocks": (*NOISY_BLOCKS, "--checkpoint-activations"),
}


def noisy(rank: int, models: dict[str, tuple[Any, ...]], same_seeds: bool = False) -> dict[str, Any]:
    """Two updates with dropout and jitter: logs, parameters, and what the first forward pass has drawn."""
    from tests.helpers.tiny import build_trainer, make_batch, parameters, update

    if same_seeds:
        import fairseq_moe.stock.step.data_axis as data_axis

        data_axis._SEED_STEP = 0
    found = {}
    for name, flags in models.items():
        trainer = build_trainer(flags, dtype=torch.float64)
        decoder, drawn = trainer.get_model().decoder, {}

        def note(module: Any, args: Any, output: Tensor, drawn: Any = drawn) -> None:
            drawn.setdefault("dropped", output == 0)

        decoder.dropout_module.register_forward_hook(note)
        (router, *_) = decoder.routers()
        stock = router._jittered

        def jittered(x_TD: Tensor, *args: Any, stock: Any = stock, drawn: Any = drawn) -> Tensor:
            output: Tensor = stock(x_TD, *args)
            drawn.setdefault("jitter", (output / x_TD).detach().float())
            return output

        router._jittered = jittered
        batches = [make_batch(number, length=16) for number in range(2)]
        logged = [update(trainer, [batch]) for batch in batches]
        losses = [each["loss"] for each in logged]
        found[name] = {"losses": losses, "parameters": parameters(trainer), **drawn}
    return found


def assert_equal(found: dict[str, Any], expected: dict[str, Any], *, bound: float) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=bound)
    for name, tensor in expected["parameters"].items():
        torch.testing.assert_close(found["parameters"][name], tensor, rtol=bound, atol=bound, msg=name)


def masks_agree(by_rank: list[dict[str, Any]]) -> bool:
    """Whether any two shards have drawn the same."""
    first, *others = [found["plain"] for found in by_rank]
    same = [torch.equal(other[kind], first[kind]) for other in others for kind in ("dropped", "jitter")]
    assert len(set(same)) == 1
    return same[0]


def test_shards_draw_masks_of_their_own_which_come_again() -> None:
    by_rank = run_ranks(noisy, 4, {name: (*flags, *C2T2) for name, flags in RUNS.items()})
    for found in by_rank:
        assert 0 < found["plain"]["dropped"].double().mean() < 1
        assert found["plain"]["losses"][0] != found["plain"]["losses"][1]
        assert_equal(found["again"], found["plain"], bound=0.0)
        assert torch.equal(found["again"]["dropped"], found["plain"]["dropped"])
        for name, other in (
            ("plain", "recomputed"),
            ("plain", "recomputed experts"),
            ("blocks", "recomputed blocks"),
        ):
            assert_equal(found[other], found[name], bound=1e-12)
        assert found["plain"]["losses"] == by_rank[0]["plain"]["losses"]
    assert not masks_agree(by_rank)


def test_these_tests_see_one_seed_for_all_shards() -> None:
    assert masks_agree(run_ranks(noisy, 2, {"plain": (*NOISY, *T2)}, True))
