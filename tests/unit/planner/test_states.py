"""Planned bytes of weights, gradients and optimizer are those of real ranks after an update, in every precision.

Run with ``pytest tests/unit/planner/test_states.py``.
"""

from types import SimpleNamespace
from typing import Any

import pytest

from fairseq_moe.errors import ConfigError
from fairseq_moe.planner.mapping import precision_of
from tests.helpers.ranks import run_ranks

_ADAM = ("--optimizer", "adam", "--lr", 1e-3, "--adam-betas", "(0.9, 0.98)")
_LEGACY = ("--ddp-backend", "legacy_ddp")
_FP16 = ("--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", 4)
_PURE = ("--memory-efficient-fp16", "--fp16-init-scale", 4)
CASES: dict[str, tuple[Any, ...]] = {
    "float32": (*_ADAM, *_LEGACY),
    "sgd": ("--optimizer", "sgd", *_LEGACY),
    "sgd with momentum": ("--optimizer", "sgd", "--momentum", 0.9, *_LEGACY),
    "bf16": (*_ADAM, "--bf16", *_LEGACY),
    "fp16": (*_ADAM, *_FP16, *_LEGACY),
    "memory-efficient fp16": (*_ADAM, *_PURE, *_LEGACY),
    "half-precision Adam": (*_ADAM, *_PURE, "--fp16-adam-stats", *_LEGACY),
    "half-precision Adam, float32": (*_ADAM, "--fp16-adam-stats", *_LEGACY),
    "frozen experts": (*_ADAM, "--bf16", "--moe-freeze-modules", "experts", *_LEGACY),
    "frozen routers": (*_ADAM, "--moe-freeze-modules", "routers", *_LEGACY),
    "ZeRO-1": (*_ADAM, "--bf16", "--use-distributed-optimizer"),
    "ZeRO-3": (*_ADAM, "--use-torch-fsdp2"),
    "fully_sharded": (*_ADAM, "--ddp-backend", "fully_sharded"),
    "fully_sharded, layers apart": (*_ADAM, "--ddp-backend", "fully_sharded", "--checkpoint-activations"),
    "fully_sharded, pure": (*_ADAM, *_PURE, "--fp16-adam-stats", "--ddp-backend", "fully_sharded"),
    "one expert": (*_ADAM, "--moe-expert-count", 1, "--moe-top1-expert", "--use-torch-fsdp2"),
}


def _bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _after_an_update(rank: int, cases: dict[str, tuple[Any, ...]]) -> dict[str, dict[str, tuple[int, int]]]:
    """Count planned and real bytes that this rank has, as the optimizer steps."""
    from fairseq_moe.planner.states import state_bytes
    from fairseq_moe.stock.optim import float32_copies
    from tests.helpers.planned import mapping_from, parse_flags, shape_from
    from tests.helpers.presets import WordIds
    from tests.helpers.tiny import TINY_FLAGS, build_trainer, make_batch, update

    found = {}
    for name, flags in cases.items():
        trainer = build_trainer(flags)
        update(trainer, [make_batch(rank)])
        optimizer = trainer.optimizer
        own = list(trainer.model.parameters())
        copies = [copy for copy, _ in float32_copies(optimizer)]
        steps = getattr(
            optimizer, "fp32_optimizer", getattr(optimizer, "wrapped_optimizer", optimizer)
        ).optimizer
        states = [
            value
            for state in steps.state.values()
            for value in state.values()
            if getattr(value, "ndim", 0) > 0  # not the numbers of a whole tensor
        ]
        grads = [p.grad for p in own if p.grad is not None]
        copy_grads = [p.grad for p in copies if p.grad is not None]
        args = parse_flags([*TINY_FLAGS, *flags])
        planned = state_bytes(
            shape_from(args, WordIds(len(trainer.task.source_dictionary), pad=1)),
            mapping_from(args, num_ranks=2),
            precision_of(trainer.cfg, runs_kernels=False),
            0,
            rank=rank,
        )
        found[name] = {
            "weights": (planned.parameters, _bytes_of(own)),
            "gradients": (planned.gradients, _bytes_of(grads)),
            "optimizer": (planned.optimizer, _bytes_of([*copies, *copy_grads, *states])),
        }
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_hold_the_planned_bytes() -> None:
    for rank, found in enumerate(run_ranks(_after_an_update, 2, CASES, timeout=280)):
        wrong = {
            f"{name}, {part}": sizes
            for name, parts in found.items()
            for part, sizes in parts.items()
            if sizes[0] != sizes[1]
        }
        assert wrong == {}, rank
        assert found.keys() == CASES.keys()


def _cfg(optimizer: str, **common: bool) -> Any:
    names = ("fp16", "bf16", "memory_efficient_fp16", "memory_efficient_bf16")
    return SimpleNamespace(
        common=SimpleNamespace(**{name: common.get(name, False) for name in names}),
        optimizer=SimpleNamespace(
            _name=optimizer, fp16_adam_stats=common.get("adam_stats", False), momentum=0.0
        ),
        distributed_training=SimpleNamespace(ddp_backend="legacy_ddp"),
    )


@pytest.mark.parametrize(
    ("common", "on_cpu", "on_gpu"),
    [
        ({}, 16, 16),
        ({"bf16": True}, 20, 16),  # Adam's kernel reads half-precision gradients: no float32 copy of them
        ({"fp16": True}, 20, 16),
        ({"fp16": True, "memory_efficient_fp16": True}, 12, 12),
        ({"fp16": True, "memory_efficient_fp16": True, "adam_stats": True}, 8, 8),
    ],
)
def test_bytes_of_a_parameter(common: dict[str, bool], on_cpu: int, on_gpu: int) -> None:
    for runs_kernels, expected in ((False, on_cpu), (True, on_gpu)):
        found = precision_of(_cfg("adam", **common), runs_kernels=runs_kernels)
        assert found.weight + found.grad + found.optimizer == expected


def test_an_optimizer_of_other_states_is_refused() -> None:
    with pytest.raises(ConfigError, match="--optimizer is adafactor, whose states the planner does not know"):
        precision_of(_cfg("adafactor"), runs_kernels=True)
