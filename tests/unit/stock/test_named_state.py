"""Which implementation of *state by name* a run gets, and the numbers that an optimizer gets back."""

from types import SimpleNamespace
from typing import Any

import pytest

from fairseq_moe.stock.checkpoint import named_state
from fairseq_moe.stock.checkpoint.named_state import (
    WholeState,
    choose_state,
    implements_state,
    numbered_groups,
)
from fairseq_moe.stock.sharding.fsdp_state import FairscaleState


def trainer_with(backend: str, **further: Any) -> SimpleNamespace:
    distributed = SimpleNamespace(ddp_backend=backend)
    return SimpleNamespace(cfg=SimpleNamespace(distributed_training=distributed, **further))


@pytest.mark.parametrize(
    ("backend", "expected"),
    [("legacy_ddp", WholeState), ("pytorch_ddp", WholeState), ("fully_sharded", FairscaleState)],
)
def test_each_backend_has_its_implementation(backend: str, expected: type) -> None:
    assert type(choose_state(trainer_with(backend))) is expected


def test_a_declared_implementation_is_chosen_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named_state, "_IMPLEMENTATIONS", [*named_state._IMPLEMENTATIONS])

    @implements_state(lambda cfg: getattr(cfg, "model", None) == "sharded anew")
    class AnotherState:
        def __init__(self, trainer: Any) -> None:
            self.trainer = trainer

    trainer = trainer_with("legacy_ddp", model="sharded anew")
    chosen = choose_state(trainer)
    assert isinstance(chosen, AnotherState)
    assert chosen.trainer is trainer
    assert type(choose_state(trainer_with("legacy_ddp"))) is WholeState
    assert type(choose_state(trainer_with("fully_sharded"))) is FairscaleState


def test_groups_get_the_numbers_of_this_optimizers_parameters() -> None:
    optimizer = SimpleNamespace(
        optimizer=SimpleNamespace(param_groups=[{"params": "ab", "lr": 1}, {"params": "c", "lr": 1}])
    )
    saved = [{"lr": 2}, {"lr": 3}]
    assert numbered_groups(saved, optimizer) == [{"lr": 2, "params": [0, 1]}, {"lr": 3, "params": [2]}]
    with pytest.raises(ValueError, match="longer"):
        numbered_groups(saved[:1], optimizer)
