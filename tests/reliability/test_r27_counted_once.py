"""R27: whatever is computed again or only evaluated, statistics, losses and counters of an update are counted once.

Whole models under the Trainer with the expert bias and the global loss, whose counters last for an update. Parts of
layers: ``tests/unit/modules/test_recompute.py``; --moe-recompute-modules: ``tests/distributed/test_recompute.py``.
"""

import functools
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.router_family import GLOBAL, MEGATRON, router_batches, routers

FLAGS = [*MEGATRON, *GLOBAL, "--update-freq", 2, "--ddp-backend", "legacy_ddp"]
VARIANTS: dict[str, list[Any]] = {
    "plain": [],
    "activation checkpoints": ["--checkpoint-activations"],
    "validated in between": [],
    "generated in between": [],
    "passes without gradients in between": [],
}
_TIMING = {"ups", "wps", "wall", "train_wall"}


def _forget_the_first_pass() -> None:
    """A recomputed layer takes its choice anew, and notes it once more."""
    from fairseq_moe.modules.moe_layer import RoutingMemo

    RoutingMemo.decision = property(lambda self: None, lambda self, value: None)  # type: ignore


def _count_whatever_passes() -> None:
    """The counters do not ask whether the model trains."""
    from fairseq_moe.modules import RouterMode
    from fairseq_moe.modules.routing import router

    stock = router.Router.forward

    def forward(self: Any, x_TD: Any, *, tokens: Any, decision: Any = None) -> Any:
        routed = stock(self, x_TD, tokens=tokens, decision=decision)
        if tokens.mode is not RouterMode.TRAIN:
            self.local_counts_E += routed.decision.counts.requested_E
        return routed

    router.Router.forward = forward


MUTATIONS = {
    "": lambda: None,
    "forget the first pass": _forget_the_first_pass,
    "count whatever passes": _count_whatever_passes,
}


def _two_updates(rank: int, variants: list[str], mutation: str = "") -> dict[str, Any]:
    """What two updates log, step and count; what a variant does in between comes after the first micro-batch."""
    from tests.helpers.tiny import build_trainer, parameters, update

    MUTATIONS[mutation]()
    found = {}
    for variant in variants:
        trainer = build_trainer([*FLAGS, *VARIANTS[variant]])
        _disturb(trainer, variant)
        logged, counts = [], []
        for _ in range(2):
            numbers = update(trainer, router_batches(rank, 2, 2))
            logged.append({k: v for k, v in numbers.items() if k not in _TIMING and "time" not in k})
            counts += [router.local_counts_E.tolist() for router in routers(trainer)]
        bias = {f"bias{index}": router.expert_bias for index, router in enumerate(routers(trainer))}
        found[variant] = {"logged": logged, "counts": counts, "tensors": parameters(trainer) | bias}
    return found


def _disturb(trainer: Any, variant: str) -> None:
    """Put another pass between the micro-batches of each update, where counters are half full."""
    from tests.helpers.tiny import make_batch

    batch = make_batch(77, num_sequences=3, length=9)
    tokens = batch["net_input"]["src_tokens"]
    train_step = trainer.task.train_step

    def then_disturb(*args: Any, **kwargs: Any) -> Any:
        result = train_step(*args, **kwargs)
        model = trainer.get_model()
        with torch.random.fork_rng(), torch.no_grad():
            if variant.startswith("validated"):
                trainer.task.valid_step(batch, model.eval(), trainer.criterion)
            elif variant.startswith("generated"):
                model.eval().decoder(tokens[:, :1], incremental_state={})
            elif variant.startswith("passes"):
                model.eval()(**batch["net_input"])
        model.train()
        return result

    trainer.task.train_step = then_disturb


@functools.cache
def _found() -> dict[str, Any]:
    result: dict[str, Any] = run_ranks(_two_updates, 2, list(VARIANTS), timeout=60)[0]
    return result


def _assert_counted_once(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["counts"] == expected["counts"]
    assert found["logged"] == expected["logged"]
    for name, tensor in expected["tensors"].items():
        assert torch.equal(found["tensors"][name], tensor), name


def test_plain_counters_are_those_of_one_update() -> None:
    """Each of this rank's tokens asks for two experts, padding for none."""
    wanted = sum(int(batch["ntokens"]) for batch in router_batches(0, 2, 2)) * 2
    assert [sum(counts) for counts in _found()["plain"]["counts"]] == [wanted] * 2


@pytest.mark.parametrize("variant", list(VARIANTS)[1:])
def test_numbers_and_counters_are_those_of_plain_updates(variant: str) -> None:
    _assert_counted_once(_found()[variant], _found()["plain"])


@pytest.mark.parametrize(
    ("mutation", "variant"),
    [
        ("forget the first pass", "activation checkpoints"),
        ("count whatever passes", "validated in between"),
        ("count whatever passes", "generated in between"),
    ],
)
def test_these_tests_see_a_pass_that_counts_again(mutation: str, variant: str) -> None:
    found = run_ranks(_two_updates, 2, [variant], mutation, timeout=60)[0][variant]
    with pytest.raises(AssertionError):
        _assert_counted_once(found, _found()["plain"])
