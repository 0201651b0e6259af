"""--ddp-backend fully_sharded: the numbers of a single process on any number of ranks, and state by name.

Run with ``pytest tests/distributed/test_fsdp.py``. Single updates under every backend are compared in
``test_training_equality.py``; here are runs of several updates, whose optimizer state is sharded too.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.ranks import run_ranks
from tests.helpers.several_updates import ADAM, NUM_UPDATES, assert_close, micro_batches, run_updates, train

SHARDED = ["--ddp-backend", "fully_sharded"]
WRAP_ALL = ["--min-params-to-wrap", "1"]
MOMENTUM = ["--momentum", "0.9", "--clip-norm", "1", "--bucket-cap-mb", "0"]
DENSE = ["--moe-freq", "0", "--moe-expert-count", "0"]


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        pytest.param(1, [*ADAM, "--checkpoint-activations"], id="alone"),
        pytest.param(
            2,
            [*ADAM, "--clip-norm", "0.5", "--checkpoint-activations", *WRAP_ALL],
            id="two-ranks",
        ),
        pytest.param(
            4,
            [*MOMENTUM, *WRAP_ALL, "--moe-expert-count", "2", "--no-reshard-after-forward"],
            id="four-ranks-two-experts",
        ),
    ],
)
def test_several_updates_equal_a_single_process(world_size: int, flags: list[str]) -> None:
    [alone] = run_ranks(train, 1, flags, list(range(world_size)))
    sharded = run_ranks(train, world_size, [*flags, *SHARDED])
    logged, parameters, optimizer = alone
    for rank, (rank_logged, _, _) in enumerate(sharded):
        for found, expected in zip(rank_logged, logged, strict=True):
            for name in ("loss", "moe_gate_loss", "gnorm", "sample_size"):
                assert found[name] == pytest.approx(expected[name], rel=3e-6), (rank, name)
    assert_close(sharded[0][1], parameters)
    for kind in {key.rpartition("/")[2] for key in optimizer}:
        found, expected = (
            {key: value for key, value in state.items() if key.endswith(f"/{kind}")}
            for state in (sharded[0][2], optimizer)
        )
        assert_close(found, expected)


def save_and_load(rank: int, flags: list[str]) -> None:
    """State taken out is complete, in memory of its own, and puts a fresh trainer where the old one was."""
    from fairseq_moe.models.sizes import true_size
    from fairseq_moe.parallel.placement import is_expert
    from fairseq_moe.stock.sharding.fsdp_state import FairscaleState
    from tests.helpers.tiny import build_trainer, update

    plain = build_trainer([*flags, "--ddp-backend", "legacy_ddp"])
    trainer = build_trainer([*flags, *SHARDED])
    run_updates(trainer, [rank])

    def is_kept(name: str) -> bool:
        return rank == 0 or ".experts." in name

    state_by_name = FairscaleState(trainer)
    model = state_by_name.model_tensors(is_kept)
    named = state_by_name.optimizer_values(is_kept)

    whole = plain.get_model().state_dict()
    sizes_of, aliases = state_by_name.tensor_bytes()
    assert sizes_of.keys() | aliases.keys() == whole.keys()
    expected = {name: tensor.shape for name, tensor in whole.items() if is_kept(name)}
    assert {name: tensor.shape for name, tensor in model.items()} == expected
    trained = {name for name, _ in plain.get_model().named_parameters() if name in expected}
    assert set(named) == trained
    for name, state in named.items():
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == expected[name]
        assert not torch.equal(state["exp_avg"], state["exp_avg_sq"])
        assert state["exp_avg"].untyped_storage().nbytes() == state["exp_avg"].nbytes, name
        assert model[name].untyped_storage().nbytes() == model[name].nbytes, name
    for of_experts in (False, True):
        sizes = [
            sum(true_size(p) for p in made.get_model().parameters() if is_expert(p) is of_experts)
            for made in (plain, trainer)
        ]
        assert sizes[0] == sizes[1] > 0

    from fairseq_moe.distributed import broadcast_value

    model = broadcast_value(model) | model
    named = broadcast_value(named) | named
    other = build_trainer([*flags, *SHARDED, "--seed", "4"])
    update(other, micro_batches(7, rank))  # so that copies of old weights could be lying about
    other.model.eval()
    other.valid_step(micro_batches(7, rank)[0])
    other.model.load_state_dict(model, strict=True)
    groups = other.optimizer.optimizer.param_groups
    other.optimizer.load_state_dict(FairscaleState(other).optimizer_form(named, groups))
    other.set_num_updates(trainer.get_num_updates())
    next_batches = micro_batches(NUM_UPDATES, rank, may_be_missing=False)
    logged = [update(made, next_batches) for made in (other, trainer)]
    for name in ("loss", "gnorm"):
        assert logged[0][name] == logged[1][name]
    for one, same in zip(other.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(one, same)
    check_refusals(other, model, named)


def check_refusals(trainer: Any, model: dict[str, Tensor], named: dict[str, dict[str, Any]]) -> None:
    from fairseq_moe.errors import CheckpointError
    from fairseq_moe.stock.sharding.fsdp_state import FairscaleState, load_full_model_state

    name = "decoder.layers.1.moe_layer.experts.fc1_bias"
    short = model[name][:, 1:]
    for wrong, said in (
        ({key: value for key, value in model.items() if key != name}, f"{name} is missing"),
        ({**model, "extra": short}, "extra is unknown"),
        ({**model, name: short}, f"{name} is {tuple(short.shape)} instead of {tuple(model[name].shape)}"),
    ):
        with pytest.raises(CheckpointError) as error:
            load_full_model_state(trainer.model, wrong)
        assert said in str(error.value)
    state = named[name]
    for wrong, said in (
        ({key: value for key, value in named.items() if key != name}, f"{name} has [] instead of"),
        ({**named, "extra": state}, "extra is unknown"),
        ({**named, name: {**state, "exp_avg": short}}, f"exp_avg of {name} is {tuple(short.shape)}"),
        ({**named, name: {**state, "step": state["step"] + 1}}, f"step of {name} is {NUM_UPDATES + 1}"),
    ):
        with pytest.raises(CheckpointError) as error:
            FairscaleState(trainer).optimizer_form(wrong, trainer.optimizer.optimizer.param_groups)
        assert said in str(error.value)


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        pytest.param(1, [], id="alone"),
        pytest.param(2, ["--memory-efficient-fp16", "--fp16-init-scale", "4"], id="two-ranks-pure-fp16"),
        pytest.param(4, ["--moe-expert-count", "2", *WRAP_ALL], id="four-ranks-two-experts"),
    ],
)
def test_state_by_name_makes_the_same_trainer(world_size: int, flags: list[str]) -> None:
    run_ranks(save_and_load, world_size, [*ADAM, *flags])


def train_in_half_precision(rank: int) -> None:
    """Losses as with another backend; with float32 masters, the optimizer sees float32 gradients only."""
    from tests.helpers.tiny import build_trainer

    for flag, dtype in (("--fp16", torch.float32), ("--memory-efficient-fp16", torch.float16)):
        flags = [*ADAM, flag, "--fp16-no-flatten-grads", "--fp16-init-scale", "4"]
        plain = build_trainer([*flags, "--ddp-backend", "legacy_ddp"])
        sharded = build_trainer([*flags, *SHARDED])
        expected, found = (
            [logged["loss"] for logged in run_updates(made, [rank])] for made in (plain, sharded)
        )
        assert found == pytest.approx(expected, rel=3e-3)
        assert {(p.dtype, p.grad.dtype) for p in sharded.model.parameters()} == {(dtype, dtype)}


@pytest.mark.parametrize("world_size", [1, 2])
def test_half_precision(world_size: int) -> None:
    run_ranks(train_in_half_precision, world_size)


def save_and_resume_dense(rank: int, folder: str) -> None:
    """With stock's own checkpoint functions: the losses of another backend before and after loading."""
    from fairseq import checkpoint_utils

    from fairseq_moe.distributed import barrier
    from tests.helpers.tiny import build_trainer, update

    losses = []
    for backend in ("legacy_ddp", "fully_sharded"):
        flags = [*DENSE, *ADAM, "--ddp-backend", backend, "--save-dir", f"{folder}/{backend}"]
        trainer = build_trainer(flags)
        before = [update(trainer, micro_batches(number, rank))["loss"] for number in range(2)]
        position = {"epoch": 1, "version": 2, "iterations_in_epoch": 2, "shuffle": True}
        epoch_itr = SimpleNamespace(epoch=1, end_of_epoch=lambda: False, state_dict=lambda at=position: at)
        checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, epoch_itr, None)
        barrier()
        resumed = build_trainer([*flags, "--seed", "4"])
        resumed.load_checkpoint(f"{folder}/{backend}/checkpoint_last.pt")
        batches = [micro_batches(number, rank, may_be_missing=False) for number in (2, 3)]
        losses.append(before + [update(resumed, batch)["loss"] for batch in batches])
    assert losses[1] == pytest.approx(losses[0], rel=3e-6)


@pytest.mark.parametrize("world_size", [1, 2])
def test_dense_model_with_stock_checkpoints(world_size: int, tmp_path: Path) -> None:
    """Saved and resumed as with another backend; Adam's two moments are not one buffer."""
    run_ranks(save_and_resume_dense, world_size, str(tmp_path))
    saved = torch.load(tmp_path / "fully_sharded" / "checkpoint_last.pt", weights_only=True)
    states = saved["last_optimizer_state"]["state"].values()
    assert states
    for state in states:
        assert not torch.equal(state["exp_avg"], state["exp_avg_sq"])


def compare_expert_grad_divisors(rank: int) -> None:
    """Four ranks, each expert on two of them: an expert sees the tokens of two ranks, so n is 2."""
    from tests.helpers.tiny import build_trainer, gradients, update

    made = {}
    for divisor in ("world_size", "sqrt_world_size"):
        flags = ["--moe-expert-count", "2", "--moe-normalize-expert-grad", divisor, *SHARDED]
        trainer = build_trainer(flags)
        update(trainer, micro_batches(0, rank))
        made[divisor] = gradients(trainer)
    for name, grad in made["world_size"].items():
        if name == "decoder.version":  # a buffer
            continue
        factor = 2**0.5 if ".experts." in name else 1.0
        torch.testing.assert_close(made["sqrt_world_size"][name], factor * grad, rtol=1e-6, atol=0.0)


def test_sqrt_world_size_leaves_expert_gradients_larger() -> None:
    run_ranks(compare_expert_grad_divisors, 4)


def problems(rank: int, flags: list[str]) -> list[str]:
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    import fairseq_moe  # noqa: F401
    from fairseq_moe.flags.moe_checks import moe_problems
    from tests.helpers.tiny import TINY_FLAGS

    parser = options.get_training_parser()
    args = options.parse_args_and_arch(parser, [*TINY_FLAGS, *SHARDED, *flags])
    return moe_problems(convert_namespace_to_omegaconf(args), world_size=1)


def test_refused_flags() -> None:
    flags = ["--bf16", "--not-fsdp-flatten-parameters", "--fp32-reduce-scatter"]
    [found] = run_ranks(problems, 1, flags)
    assert sorted(problem.split()[0] for problem in found) == [
        "--bf16",
        "--fp32-reduce-scatter",
        "--not-fsdp-flatten-parameters",
    ]
    assert run_ranks(problems, 1, ["--fp16", "--fp32-reduce-scatter"]) == [[]]
