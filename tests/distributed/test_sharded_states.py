"""--use-distributed-optimizer and --use-torch-fsdp2: the numbers of legacy_ddp and of one process, from parts of state.

Run with ``pytest tests/distributed/test_sharded_states.py``. One start of 2 or 4 ranks runs all cases of its size, each
under both flags and under legacy_ddp. Checkpoints of such runs: tests/reliability.
"""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.block_models import MODELS
from tests.helpers.ranks import run_ranks
from tests.helpers.several_updates import (
    ADAM,
    NUM_UPDATES,
    micro_batches,
    run_updates,
    whole_optimizer_state,
)
from tests.helpers.updates import alone, assert_equal, on_ranks

LEGACY = ("--ddp-backend", "legacy_ddp")
KINDS = {"zero-1": ("--use-distributed-optimizer",), "zero-3": ("--use-torch-fsdp2",)}
FP16 = ("--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", 4)
PURE_FP16 = ("--memory-efficient-fp16", "--fp16-init-scale", 4)

# Updates of two micro-batches each; the last one of one rank in the third is a dummy.
CASES: dict[str, tuple[Any, ...]] = {
    "float32": (),
    "recomputed layers": ("--checkpoint-activations",),
    "dropout": ("--dropout", 0.1),
    "fp16": FP16,
    "memory-efficient fp16": PURE_FP16,
    "bf16": ("--bf16",),
    "memory-efficient bf16": ("--memory-efficient-bf16",),
    "frozen routers": ("--moe-freeze-modules", "routers"),
    "frozen experts": ("--moe-freeze-modules", "experts"),
    "grouped blocks": MODELS["grouped"],
    "latent blocks": MODELS["latent"],
    "sgd": ("--optimizer", "sgd", "--momentum", 0.9),
}
# The norm is a sum in another order, so clipping moves every number in its last digit.
CLIPPED = {"clipped": ("--clip-norm", 0.1), "clipped fp16": (*FP16, "--clip-norm", 0.1)}
ON_FOUR = ("float32", "recomputed layers", "fp16", "bf16", "latent blocks", *CLIPPED)
# (flags of the layout, what all ranks' updates must be equal to)
SINGLE = {
    2: {
        "4 experts": ("--moe-expert-count", 4),
        "1 expert held twice": ("--moe-expert-count", 1, "--moe-top1-expert"),
    },
    4: {"4 experts": ("--moe-expert-count", 4), "2 experts held twice": ("--moe-expert-count", 2)},
}
EXPERTS = {2: ("--moe-expert-count", 4), 4: ("--moe-expert-count", 2)}


def several(rank: int, flags: list[Any]) -> dict[str, Any]:
    """Do three updates, validate, and do one more."""
    from tests.helpers.tiny import build_trainer, gradients, parameters, update

    trainer = build_trainer(flags if "--optimizer" in flags else [*ADAM, *flags])
    logged = run_updates(trainer, [rank])
    trainer.model.eval()
    validated = trainer.valid_step(micro_batches(7, rank)[0])
    logged.append(update(trainer, micro_batches(NUM_UPDATES, rank, may_be_missing=False)))
    return {
        "logged": [{name: each[name] for name in ("loss", "gnorm", "sample_size")} for each in logged],
        "validated": float(validated["loss"]),
        "gradients": gradients(trainer),
        "parameters": parameters(trainer),
        "state": whole_optimizer_state(trainer),
    }


def all_cases(rank: int, world_size: int) -> dict[str, Any]:
    return {
        f"{name}/{kind}": several(rank, [*EXPERTS[world_size], *flags, *more])
        for name, flags in (CASES | CLIPPED).items()
        if world_size == 2 or name in ON_FOUR
        for kind, more in ({"legacy": LEGACY} | KINDS).items()
    }


@functools.cache
def found_on(world_size: int) -> list[dict[str, Any]]:
    return run_ranks(all_cases, world_size, world_size, timeout=240)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_legacy_ddp_to_the_bit(name: str, kind: str) -> None:
    for found in found_on(2):
        expected, own = found[f"{name}/legacy"], found[f"{name}/{kind}"]
        for each, wanted in zip(own["logged"], expected["logged"], strict=True):
            assert each == pytest.approx(wanted, rel=1e-6)
        assert own["validated"] == expected["validated"]
        for part in ("gradients", "parameters", "state"):
            assert own[part].keys() == expected[part].keys()
            differing = [
                key for key, tensor in expected[part].items() if not torch.equal(own[part][key], tensor)
            ]
            assert differing == [], part


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "world_size"), [*((name, 4) for name in ON_FOUR), *((n, 2) for n in CLIPPED)]
)
def test_other_sums_equal_legacy_ddp_but_for_their_order(name: str, world_size: int, kind: str) -> None:
    half = "fp16" in name or "bf16" in name
    for found in found_on(world_size):
        expected, own = found[f"{name}/legacy"], found[f"{name}/{kind}"]
        for each, wanted in zip(own["logged"], expected["logged"], strict=True):
            assert each == pytest.approx(wanted, rel=1e-2 if half else 1e-5)
        for part in ("gradients", "parameters"):
            assert_close_to(own[part], expected[part], 2e-2 if half else 1e-5)


def assert_close_to(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == expected.keys()
    total = torch.stack([tensor.double().norm() for tensor in expected.values()]).norm()
    for name, tensor in expected.items():
        difference = (found[name].double() - tensor.double()).norm()
        assert difference <= bound * (tensor.double().norm() + 0.1 * total), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("world_size", "layout"), [(size, name) for size, names in SINGLE.items() for name in names]
)
def test_one_update_equals_one_process_in_double_precision(world_size: int, layout: str, kind: str) -> None:
    flags = SINGLE[world_size][layout]
    expected = alone(flags, world_size, dtype=torch.float64)
    for found in on_ranks((*flags, *KINDS[kind]), world_size, dtype=torch.float64):
        assert_equal(found, expected, relative=1e-10, of_norm=1e-12)


def compare_expert_grad_divisors(rank: int, flags: list[Any]) -> None:
    from tests.helpers.tiny import build_trainer, gradients, update

    made = {}
    for divisor in ("world_size", "sqrt_world_size"):
        by = ["--moe-expert-count", 2, "--moe-normalize-expert-grad", divisor]
        for kind, more in KINDS.items():
            trainer = build_trainer([*flags, *by, *more])
            update(trainer, micro_batches(0, trainer.data_parallel_rank))
            made[divisor, kind] = gradients(trainer)
    for kind, factor in (("zero-1", 1.0), ("zero-3", 2**0.5)):  # four ranks, each expert on two of them
        for name, grad in made["world_size", kind].items():
            if ".experts." in name:
                torch.testing.assert_close(
                    made["sqrt_world_size", kind][name], factor * grad, rtol=1e-6, atol=0.0
                )


@pytest.mark.parametrize(
    "flags", [[], ["--tensor-model-parallel-size", 2, "--sequence-parallel"]], ids=["data", "tensor"]
)
def test_expert_gradients_are_divided_by_a_root_only_where_parameters_are_sharded(flags: list[Any]) -> None:
    run_ranks(compare_expert_grad_divisors, 4, flags)


def bytes_held(rank: int, flags: list[Any]) -> dict[str, Any]:
    """Count what a rank holds between updates, and whether layers' parameters are gathered after a forward pass."""
    from tests.helpers.tiny import build_trainer, update

    trainer = build_trainer([*ADAM, "--moe-expert-count", 2, *flags])
    update(trainer, micro_batches(0, rank))
    held = list(trainer.model.parameters())
    states = trainer.optimizer.optimizer.state.values()
    found = {
        "parameters": sum(p.nbytes for p in held),
        "optimizer": sum(
            value.nbytes for state in states for value in state.values() if torch.is_tensor(value)
        ),
    }
    trainer.model.eval()
    trainer.valid_step(micro_batches(7, rank)[0])
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in trainer.get_model().decoder.layers]
    plain = [type(p) is torch.nn.Parameter for p in trainer.get_model().decoder.layers.parameters()]
    return found | {"layers": sizes, "gathered": all(plain), "freed": not any(plain)}


def all_bytes(rank: int) -> dict[str, dict[str, Any]]:
    return {kind: bytes_held(rank, list(more)) for kind, more in ({"legacy": LEGACY} | KINDS).items()}


def test_each_rank_holds_its_part_of_states_and_parameters() -> None:
    """Dense ones in quarters, each of the two experts in halves; nothing is left over but what does not divide."""
    by_rank = run_ranks(all_bytes, 4)
    legacy = by_rank[0]["legacy"]
    assert legacy["optimizer"] == 2 * legacy["parameters"]  # two moments
    expert = 4 * (8 * 12 + 12 + 12 * 8 + 8)
    dense = legacy["parameters"] - expert
    for kind in KINDS:
        for found in by_rank:
            own = found[kind]
            assert own["optimizer"] == 2 * own["parameters"]
            assert own["parameters"] == pytest.approx(dense / 4 + expert / 2, rel=0.02)
        assert sum(found[kind]["parameters"] for found in by_rank) == dense + 2 * expert
    assert {(found["zero-1"]["gathered"], found["zero-3"]["freed"]) for found in by_rank} == {(True, True)}


def loaded_after_validation(rank: int) -> dict[str, Any]:
    """Validate, which leaves parameters gathered under ZeRO-1, load other ones, and validate again."""
    from fairseq_moe.stock.run import run_of
    from tests.helpers.tiny import build_trainer, parameters

    found = {}
    for kind, more in ({"legacy": LEGACY} | KINDS).items():
        trainer = build_trainer(["--moe-expert-count", 1, "--moe-top1-expert", *more])
        trainer.model.eval()
        run = run_of(trainer)
        assert run is not None
        doubled = {name: 2 * value for name, value in run.state.model_tensors().items()}
        before = float(trainer.valid_step(micro_batches(7, rank)[0])["loss"])
        trainer.model.load_state_dict(doubled)
        after = float(trainer.valid_step(micro_batches(7, rank)[0])["loss"])
        found[kind] = {"losses": (before, after), "parameters": parameters(trainer)}
    return found


def test_parameters_that_are_loaded_after_a_validation_take_effect() -> None:
    for found in run_ranks(loaded_after_validation, 2):
        expected = found["legacy"]
        assert expected["losses"][0] != expected["losses"][1]
        for kind in KINDS:
            assert found[kind]["losses"] == expected["losses"]
            for name, tensor in expected["parameters"].items():
                assert torch.equal(found[kind]["parameters"][name], tensor), name


def lost_mark(module: Any) -> None:
    module.place = lambda parameters, placement: None


def norm_without_copies(module: Any) -> None:
    import fairseq_moe.stock.step.gradients as gradients

    gradients.num_copies = lambda placement, ranks: 1


MUTATIONS = {
    "nothing": lambda module: None,
    "the mark of new parameters is lost": lost_mark,
    "the norm counts every copy": norm_without_copies,
}


def mutated(rank: int, flags: list[Any], mutation: str) -> dict[str, Any]:
    import fairseq_moe.stock.sharding.sharded_model as sharded_model
    from tests.helpers.tiny import build_trainer, gradients, make_batch, update

    MUTATIONS[mutation](sharded_model)
    trainer = build_trainer(flags)
    logged = update(trainer, [make_batch(rank)])
    return {"gnorm": logged["gnorm"], "gradients": gradients(trainer)}


@pytest.mark.parametrize(
    ("mutation", "flags", "world_size"),
    [
        ("the mark of new parameters is lost", ("--moe-expert-count", 2, "--use-torch-fsdp2"), 4),
        ("the norm counts every copy", ("--moe-expert-count", 4, *LEGACY), 2),
    ],
)
def test_these_tests_see(mutation: str, flags: tuple[Any, ...], world_size: int) -> None:
    found = run_ranks(mutated, world_size, list(flags), mutation)
    expected = run_ranks(mutated, world_size, [*flags[:2], *LEGACY], "nothing")
    wrong = {
        name
        for name, tensor in expected[0]["gradients"].items()
        if (found[0]["gradients"][name] - tensor).norm() > 1e-5 * (tensor.norm() + 1e-3)
    }
    assert found[0]["gnorm"] != pytest.approx(expected[0]["gnorm"], rel=1e-3)
    assert all(".experts." in name for name in wrong)
    assert bool(wrong) == ("mark" in mutation)
