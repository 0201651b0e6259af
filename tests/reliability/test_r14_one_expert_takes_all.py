"""R14: a router that sends every token to one expert gives right results, exact counts, bounded memory and a warning.

Layers of the branch and of the top-k family on 1 and 4 ranks; further cases of capacity in
``tests/unit/modules/test_branch.py`` and ``tests/unit/modules/test_topk.py``.
"""

import functools
import logging
import math
from typing import Any

import pytest
import torch

from fairseq_moe.expert_load.watch import LoadWatch
from fairseq_moe.modules import TokenInfo
from fairseq_moe.modules.routing import topk as topk_rule
from tests.helpers.layer_stats import load_of
from tests.helpers.one_expert import ALLGATHER, DROPLESS, LIMITED, PADDED, D, E, layer_of
from tests.helpers.ranks import run_ranks

T = 64
BRANCH_1 = {"moe_freq": 1, "moe_expert_count": E, "moe_top1_expert": True}
BRANCH_2 = {"moe_freq": 1, "moe_expert_count": E, "moe_second_expert_policy": "all"}
LAYERS = {
    "branch top-1": BRANCH_1,
    "branch top-2": BRANCH_2,
    "capacity factor": LIMITED,
    "padded to it": PADDED,
    "dropless": DROPLESS,
    "dropless by allgather": ALLGATHER,
}
TOKENS = [T, 3, 0, 17]  # of each rank


def _collapses(rank: int, mutation: bool = False) -> dict[str, dict[str, Any]]:
    """Every layer in one go, as forking takes longer."""
    if mutation:
        topk_rule.expert_capacity = lambda num_tokens, *args, **kwargs: num_tokens
    return {name: _collapse(rank, flags, TOKENS) for name, flags in LAYERS.items()}


@functools.cache
def _on_ranks(world_size: int) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(_collapses, world_size, timeout=40)


def _collapse(rank: int, flags: dict[str, Any], num_tokens: list[int]) -> dict[str, Any]:
    """One training pass: what was asked for and kept, the rows this rank's experts were given, and differences from
    a layer with all experts on this rank and from the reference."""
    from fairseq_moe.distributed import all_reduce_sum, local_experts_only, parallel_mesh
    from fairseq_moe.modules import RouterMode

    layer = layer_of(flags, parallel_mesh(E))
    rows: list[int] = []
    layer.experts.register_forward_hook(lambda module, args, output: rows.append(sum(args[1].counts_L)))
    generator = torch.Generator().manual_seed(rank)
    x_TD = torch.rand(num_tokens[rank], D, generator=generator, dtype=torch.float64) + 0.5
    tokens = TokenInfo(
        mode=RouterMode.TRAIN, ids_T=torch.zeros(len(x_TD), dtype=torch.int64), num_sequences=1
    )
    y_TD, aux = layer(x_TD, tokens=tokens)
    y_TD.square().sum().backward()
    with local_experts_only():
        local = layer_of(flags, parallel_mesh(E))
        expected_TD, _ = local(x_TD, tokens=tokens)
        expected_TD.square().sum().backward()
    everyones = [all_reduce_sum(p.grad.clone()) for p in local.experts.parameters()]
    ids = parallel_mesh(E).layout.local_ids(rank)
    own = [p.grad for p in layer.experts.parameters()]
    return {
        "wanted": load_of(aux)[0].tolist(),
        "kept": load_of(aux)[1].tolist(),
        "rows": rows[0],
        "error": float((y_TD - expected_TD).abs().max()) if len(y_TD) else 0.0,
        "gradient error": max(
            float((a - b[ids.start : ids.stop]).abs().max()) for a, b in zip(own, everyones, strict=True)
        ),
        "kept outputs": int((y_TD.abs().sum(-1) > 0).sum()),
    }


@pytest.mark.parametrize(
    ("name", "capacity", "top_k"),
    [
        ("branch top-1", lambda tokens: math.ceil(tokens / E), 1),
        ("branch top-2", lambda tokens: 2 * math.ceil(tokens / E), 2),
        ("capacity factor", lambda tokens: math.ceil(tokens / E * 1.25), 1),
        ("padded to it", lambda tokens: math.ceil(tokens / E * 1.25), 1),
    ],
)
@pytest.mark.parametrize("world_size", [1, 4])
def test_with_a_limit_drops_are_counted_exactly_and_rows_are_bounded(
    world_size: int, name: str, capacity: Any, top_k: int
) -> None:
    """No rank's experts ever see more than the sum over ranks of capacity x local experts."""
    _assert_limited([found[name] for found in _on_ranks(world_size)], capacity, top_k=top_k)


def test_these_tests_see_a_limit_that_is_not_kept() -> None:
    by_rank = [found["capacity factor"] for found in run_ranks(_collapses, 4, True, timeout=40)]
    with pytest.raises(AssertionError):
        _assert_limited(by_rank, lambda tokens: math.ceil(tokens / E * 1.25), top_k=1)


def _assert_limited(by_rank: list[dict[str, Any]], capacity: Any, *, top_k: int) -> None:
    world_size = len(by_rank)
    bound = sum(capacity(tokens) for tokens in TOKENS[:world_size]) * (E // world_size)
    for tokens, found in zip(TOKENS, by_rank, strict=False):
        kept = min(tokens, capacity(tokens))
        assert found["wanted"] == [tokens] * top_k + [0] * (E - top_k)
        assert found["kept"] == [kept] * top_k + [0] * (E - top_k)
        assert found["kept outputs"] == kept
        assert found["rows"] <= bound
        assert found["error"] < 1e-12 and found["gradient error"] < 1e-10


@pytest.mark.parametrize("name", ["dropless", "dropless by allgather"])
@pytest.mark.parametrize("world_size", [1, 4])
def test_without_a_limit_nothing_is_lost(world_size: int, name: str) -> None:
    by_rank = [found[name] for found in _on_ranks(world_size)]
    for rank, (tokens, found) in enumerate(zip(TOKENS, by_rank, strict=False)):
        assert found["kept"] == found["wanted"] == [tokens] + [0] * (E - 1)
        assert found["rows"] == (sum(TOKENS[:world_size]) if rank == 0 else 0)
        assert found["error"] < 1e-12 and found["gradient error"] < 1e-10


# --- the warning ---


def _load(*wanted: list[float]) -> torch.Tensor:
    wanted_LE = torch.tensor(wanted)
    return torch.stack([wanted_LE, wanted_LE], dim=1)


EVEN, MOST = [25.0, 25.0, 25.0, 25.0], [20.0, 60.0, 10.0, 10.0]


def _warnings(watch: LoadWatch, load: torch.Tensor, updates: int) -> list[tuple[int, str]]:
    """(update from 1, sentence) of each warning."""
    return [(update, said) for update in range(1, updates + 1) for said in watch.observe(load)]


def test_the_warning_comes_after_a_hundred_updates_and_when_they_have_doubled() -> None:
    watch = LoadWatch(layers=[1, 3], top_k=1)
    found = _warnings(watch, _load(EVEN, MOST), 450)
    assert [update for update, _ in found] == [100, 200, 400]
    assert found[0][1].startswith("layer 3: 60% of the tokens ask for expert 1")
    assert "the last 100 updates" in found[0][1] and "fair share is 25%" in found[0][1]


def test_another_expert_or_an_even_update_starts_the_count_again() -> None:
    watch = LoadWatch(layers=[1], top_k=1)
    for interruption in (EVEN, MOST[::-1], [0.0] * 4):
        assert _warnings(watch, _load(MOST), 99) == []
        watch.observe(_load(interruption))
    assert [update for update, _ in _warnings(watch, _load(MOST), 150)] == [100]


@pytest.mark.parametrize(
    ("top_k", "load", "warns"),
    [
        (1, [50.0, 50.0, 0.0, 0.0], False),  # half is not more than half
        (1, [51.0, 49.0, 0.0, 0.0], True),
        (1, [60.0, 40.0], False),  # two experts cannot be far from even
        (1, [100.0, 0.0], True),
        (2, [90.0, 50.0, 30.0, 30.0], False),  # 1.8 times the mean
        (2, [100.0, 40.0, 30.0, 30.0], True),  # every token
        (2, [60.0, 20.0, 20.0, 20.0, 20.0, 20.0, 20.0, 20.0], True),
        (1, [0.0, 0.0, 0.0, 0.0], False),
    ],
)
def test_what_an_overloaded_expert_is(top_k: int, load: list[float], warns: bool) -> None:
    assert bool(_warnings(LoadWatch(layers=[0], top_k=top_k), _load(load), 100)) is warns


def _train_collapsed(rank: int, collapsed: bool, validate: bool) -> list[str]:
    """The adapter's warnings while a model trains for three updates, or is validated only."""
    from fairseq_moe.expert_load import watch as load_watch
    from fairseq_moe.stock.find_experts import moe_decoder
    from tests.helpers.tiny import build_trainer, make_batch, update

    load_watch._UPDATES = 3
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fairseq_moe.stock.step.expert_load").addHandler(handler)
    trainer = build_trainer(["--moe-top1-expert", "--lr", 0])
    decoder = moe_decoder(trainer.get_model())
    assert decoder is not None
    if collapsed:
        with torch.no_grad():
            decoder.routers()[0].weight.zero_()  # a tie, which falls to the first expert
    for step in range(3):
        batch = make_batch(10 * step + rank)
        if validate:
            trainer.valid_step(batch)
        else:
            update(trainer, [batch])
    return messages


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_warns_on_rank_0(world_size: int) -> None:
    warned, *silent = run_ranks(_train_collapsed, world_size, True, False)
    assert [message.split(",")[0] for message in warned] == ["layer 1: 100% of the tokens ask for expert 0"]
    assert silent == [[]] * (world_size - 1)


@pytest.mark.parametrize(("collapsed", "validate"), [(False, False), (True, True)])
def test_even_training_and_validation_do_not(collapsed: bool, validate: bool) -> None:
    assert run_ranks(_train_collapsed, 1, collapsed, validate) == [[]]
