"""R15: an expert, a rank or everybody may have no token: gradients are zero, not missing, and every rank makes the same
calls in the same order, so nothing hangs.

For each dispatcher, with all losses; the moe branch's gates are in ``tests/distributed/test_uneven_batches.py``.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers.one_expert import ALLGATHER, DROPLESS, PADDED, D, E, layer_of
from tests.helpers.ranks import RankError, run_ranks

LOSSES = {
    "moe_router_load_balancing_type": "aux_loss,seq_aux_loss,global_aux_loss",
    "moe_aux_loss_coeff": "0.1",
    "moe_z_loss_coeff": 0.1,
}
DISPATCHERS = {
    "alltoall": DROPLESS | LOSSES,
    "padded": PADDED | LOSSES,
    "allgather": ALLGATHER | LOSSES,
    "shared": DROPLESS | LOSSES | {"moe_shared_expert_intermediate_size": 4},
    "recomputed": DROPLESS | LOSSES | {"moe_recompute_modules": "moe"},
}
CASES = {
    "all to one expert": [8, 1, 3, 5],
    "a rank without tokens": [8, 0, 3, 5],
    "one rank with tokens": [0, 0, 7, 0],
    "no token anywhere": [0, 0, 0, 0],
}
_CALLS = (
    *("all_reduce", "all_to_all_single", "all_gather_single", "reduce_scatter_single"),
    *("all_gather", "all_gather_object", "broadcast", "barrier"),
)


def _record_calls(before: Callable[..., bool]) -> list[tuple[str, int]]:
    """From now on, the collective calls of this rank and the sizes of their groups."""
    calls: list[tuple[str, int]] = []

    def recorded(name: str, stock: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not before(*args, **kwargs):
                return SimpleNamespace(wait=lambda: None)
            calls.append((name, dist.get_world_size(kwargs.get("group"))))
            return stock(*args, **kwargs)

        return call

    for name in _CALLS:
        setattr(dist, name, recorded(name, getattr(dist, name)))
    return calls


def _no_call_for_nothing() -> None:
    """A rank that has nothing to send or to receive goes on."""

    def has_rows(*args: Any, **kwargs: Any) -> bool:
        tensors = [each for each in args if isinstance(each, Tensor)]
        return not tensors or any(each.numel() > 0 for each in tensors)

    _MUTATED.append(has_rows)


def _no_work_for_nothing() -> None:
    """Experts without rows give them back."""
    from fairseq_moe.modules import Experts

    stock = Experts._run
    Experts._run = lambda self, rows, **kwargs: stock(self, rows, **kwargs) if len(rows) else rows * 1  # type: ignore


_MUTATED: list[Callable[..., bool]] = []
MUTATIONS: dict[str, Callable[[], None]] = {
    "": lambda: None,
    "no call for nothing": _no_call_for_nothing,
    "no work for nothing": _no_work_for_nothing,
}


def _passes(rank: int, mutation: str = "") -> dict[tuple[str, str], dict[str, Any]]:
    """Every dispatcher with every case, or one of them with a mutation; in one go, as forking takes longer."""
    MUTATIONS[mutation]()
    calls = _record_calls(_MUTATED[0] if _MUTATED else lambda *args, **kwargs: True)
    found = {}
    for dispatcher, flags in DISPATCHERS.items() if not mutation else [("alltoall", DISPATCHERS["alltoall"])]:
        for case, num_tokens in CASES.items():
            found[dispatcher, case] = {**_pass(flags, num_tokens[rank]), "calls": calls.copy()}
            calls.clear()
    return found


def _pass(flags: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    from fairseq_moe.distributed import parallel_mesh
    from fairseq_moe.modules import RouterMode, TokenInfo
    from tests.helpers.layer_stats import load_of, stats_of

    layer = layer_of(flags, parallel_mesh(E))
    x_TD = torch.rand(num_tokens, D, dtype=torch.float64) + 0.5
    x_TD.requires_grad_()
    y_TD, aux = layer(x_TD, tokens=TokenInfo(mode=RouterMode.TRAIN, num_sequences=1))
    (y_TD.square().sum() + aux.losses.sum()).backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    experts = [grad for name, grad in grads.items() if name.startswith("experts.")]
    outputs = [y_TD, x_TD.grad, aux.losses, aux.measures_4, stats_of(aux), load_of(aux), *grads.values()]
    return {
        "missing": [name for name, grad in grads.items() if grad is None],
        "experts at rest": all(grad is not None and not grad.any() for grad in experts),
        "finite": all(t is None or bool(torch.isfinite(t).all()) for t in outputs),
    }


@functools.cache
def _on_four_ranks() -> list[dict[tuple[str, str], dict[str, Any]]]:
    return run_ranks(_passes, 4, timeout=60.0)


def _assert_sound(by_rank: list[dict[str, Any]], case: str) -> None:
    assert len(by_rank[0]["calls"]) >= 4  # counts, rows, results and their gradients
    for rank, found in enumerate(by_rank):
        assert found["calls"] == by_rank[0]["calls"]
        assert found["missing"] == []
        assert found["finite"]
        works = any(CASES[case]) and rank == 0
        assert found["experts at rest"] is not works


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_gradients_are_there_and_all_ranks_make_the_same_calls(dispatcher: str, case: str) -> None:
    _assert_sound([found[dispatcher, case] for found in _on_four_ranks()], case)


def test_these_tests_see_a_rank_that_makes_no_call_for_nothing() -> None:
    with pytest.raises(RankError, match=r"not done after 6 s|Connection closed|died with exit code"):
        run_ranks(_passes, 4, "no call for nothing", timeout=6.0)


def test_these_tests_see_experts_that_do_no_work_for_nothing() -> None:
    by_rank = run_ranks(_passes, 4, "no work for nothing", timeout=30.0)
    case = "no token anywhere"
    with pytest.raises(AssertionError):
        _assert_sound([found["alltoall", case] for found in by_rank], case)
