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
from fairseq_moe.stock.sharding.sharded_state import ShardedState


def trainer_with(backend: str, *, ranks: int = 2, **model: Any) -> SimpleNamespace:
    distributed = SimpleNamespace(ddp_backend=backend, distributed_world_size=ranks)
    return SimpleNamespace(cfg=SimpleNamespace(distributed_training=distributed, model=model))


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        (trainer_with("legacy_ddp"), WholeState),
        (trainer_with("pytorch_ddp"), WholeState),
        (trainer_with("fully_sharded"), FairscaleState),
        (trainer_with("fully_sharded", use_distributed_optimizer=True), FairscaleState),
        (trainer_with("pytorch_ddp", use_distributed_optimizer=True), ShardedState),
        (trainer_with("legacy_ddp", use_torch_fsdp2=True), ShardedState),
        (trainer_with("legacy_ddp", ranks=1, use_torch_fsdp2=True), WholeState),
    ],
)
def test_each_way_to_hold_parameters_has_its_implementation(trainer: Any, expected: type) -> None:
    assert type(choose_state(trainer)) is expected


def test_a_declared_implementation_is_chosen_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named_state, "_IMPLEMENTATIONS", [*named_state._IMPLEMENTATIONS])

    @implements_state(lambda cfg: "sharded_anew" in cfg.model)
    class AnotherState:
        def __init__(self, trainer: Any) -> None:
            self.trainer = trainer

    trainer = trainer_with("legacy_ddp", sharded_anew=True)
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
