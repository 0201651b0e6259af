"""Gradients, norm, states and files of a parameter of every placement, on meshes of all axes, beside one process.

Run with ``pytest tests/distributed/test_placed_states.py``. One start of ranks runs all checks of its mesh, in float64.
"""

import functools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.ranks import run_ranks

# Ranks, and the sizes of the mesh: ep_size, expert_tensor, tensor, context.
MESHES = {
    "T2E2": (2, (2, 1, 2, 1)),
    "T2, experts held twice": (2, (1, 1, 2, 1)),
    "T2X2": (2, (1, 2, 2, 1)),
    "C2E2": (2, (2, 1, 1, 2)),
    "D2T2E4": (4, (4, 1, 2, 1)),
    "D2T2E2": (4, (2, 1, 2, 1)),
    "D2T2X2": (4, (1, 2, 2, 1)),
    "C2T2E2": (4, (2, 1, 2, 2)),
    "D2C2E2X2": (4, (2, 2, 1, 2)),
    "T4E2X2": (4, (2, 2, 4, 1)),
}
KINDS = ("whole", "zero-1", "zero-3")
CLIP = 0.5


def mesh_of(sizes: tuple[int, int, int, int]) -> Any:
    from fairseq_moe.distributed import parallel_mesh
    from tests.helpers.placed_toy import NUM_EXPERTS

    ep_size, expert_tensor, tensor, context = sizes
    return parallel_mesh(NUM_EXPERTS, ep_size, expert_tensor, tensor=tensor, context=context)


def stepped(mesh: Any, kind: str) -> tuple[Any, Any, float]:
    """Do one update: backward pass, sums, norm, clipping, Adam; return the trainer, the toy and the norm."""
    from fairseq_moe.flags.sharding import Sharding
    from fairseq_moe.stock.checkpoint.named_state import WholeState
    from fairseq_moe.stock.run import MoERun, begin_run
    from fairseq_moe.stock.sharding.sharded_model import ShardedModel
    from fairseq_moe.stock.sharding.sharded_state import ShardedState
    from fairseq_moe.stock.step.gradients import GradNorm, _reduce_grads
    from tests.helpers.placed_toy import build_toy

    toy, factors = build_toy(mesh)
    trainer = SimpleNamespace(get_model=lambda: toy, model=toy)
    sharding = {"whole": None, "zero-1": Sharding.OPTIMIZER, "zero-3": Sharding.ALL}[kind]
    state = WholeState(trainer) if sharding is None else ShardedState(trainer)
    run = MoERun(decoder=toy, guard=None, state=state, at_end=lambda run: None, sharding=sharding)  # type: ignore[arg-type]
    begin_run(run, trainer, SimpleNamespace())
    trainer.run = run  # runs live as long as somebody holds them
    if sharding is not None:
        trainer.model = ShardedModel(toy, toy, mesh.dense_shards, sharding)
    trainer.model(factors).backward()
    if sharding is not None:
        trainer.model.all_reduce_grads()
    _reduce_grads(trainer.model, toy)
    held = [p for p in trainer.model.parameters() if p.requires_grad]
    norm = GradNorm(mesh.ranks).clip(held, CLIP)
    adam = torch.optim.Adam(held, lr=0.1, eps=1e-3)
    adam.step()
    trainer.optimizer = SimpleNamespace(optimizer=adam, state_dict=adam.state_dict)
    return trainer, toy, float(norm)


def joined_gradients(trainer: Any, toy: Any) -> dict[str, Tensor]:
    from fairseq_moe.parallel.placement import placement_of
    from tests.helpers.placed_toy import join

    shards, found = getattr(trainer.model, "shards", {}), {}
    for name, p in trainer.model.named_parameters():
        part = shards[name].gather(p.grad) if name in shards else p.grad
        found[name] = join(toy, name, part, placement_of(p))
    return found


def all_checks(rank: int, sizes: tuple[int, int, int, int]) -> dict[str, Any]:
    from fairseq_moe.stock.checkpoint.named_state import snapshot
    from tests.helpers.placed_toy import expected_gradients

    mesh, found = mesh_of(sizes), {}
    for kind in KINDS:
        trainer, toy, norm = stepped(mesh, kind)
        state = trainer.run.state
        found[kind] = {
            "norm": norm,
            "gradients": joined_gradients(trainer, toy),
            "content": snapshot(state, mesh, with_optimizer=True),
            "kept": kept_by_a_round_trip(trainer, state),
        }
    return found | {"expected": expected_gradients(mesh)}


def kept_by_a_round_trip(trainer: Any, state: Any) -> bool:
    """Tell whether joined optimizer state, cut again, is what this rank has."""
    before = trainer.optimizer.state_dict()
    form = state.optimizer_form(state.optimizer_values(), before["param_groups"])
    return all(
        torch.equal(form["state"][index][key], value)
        for index, values in before["state"].items()
        for key, value in values.items()
        if torch.is_tensor(value) and value.numel() > 0
    )


def all_meshes(rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    return {name: all_checks(rank, sizes) for name, (count, sizes) in MESHES.items() if count == world_size}


@functools.cache
def all_found(world_size: int) -> list[dict[str, Any]]:
    return run_ranks(all_meshes, world_size, world_size)


def found_on(name: str) -> list[dict[str, Any]]:
    return [found[name] for found in all_found(MESHES[name][0])]


def norm_of(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(grad.square().sum()) for grad in gradients.values()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MESHES)
def test_gradients_and_norm_are_those_of_one_process(name: str, kind: str) -> None:
    for found in found_on(name):
        expected = found["expected"]
        norm = norm_of(expected)
        assert found[kind]["norm"] == pytest.approx(norm, rel=1e-12)
        assert found[kind]["gradients"].keys() == expected.keys()
        for each, grad in expected.items():
            torch.testing.assert_close(
                found[kind]["gradients"][each], grad * (CLIP / (norm + 1e-6)), rtol=1e-12, atol=1e-15
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MESHES)
def test_files_hold_every_whole_tensor_and_its_state_once(name: str, kind: str) -> None:
    parameters, moments = stepped_alone(found_on(name)[0]["expected"])
    contents = [found[kind]["content"] for found in found_on(name)]
    assert [found[kind]["kept"] for found in found_on(name)] == [True] * len(contents)
    for each, expected in parameters.items():
        writers = [content for content in contents if each in content.model]
        tensors = [content.model[each] for content in writers]
        states = [content.optimizer[each] for content in contents if each in content.optimizer]
        if "experts" in each:
            ids = [expert for content in writers for expert in content.expert_ids]
            assert sorted(ids) == list(range(len(expected)))  # each once
            order = torch.tensor(ids).argsort()
            tensors = [torch.cat(tensors)[order]]
            states = [{key: torch.cat([state[key] for state in states])[order] for key in moments[each]}]
        (tensor,), (state,) = tensors, states
        torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-15)
        for key, value in moments[each].items():
            torch.testing.assert_close(state[key], value, rtol=1e-12, atol=1e-15)
    aliases = [content.aliases for content in contents if content.aliases]
    assert aliases == [{"output_projection.weight": "embed_tokens.weight"}]


def stepped_alone(gradients: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    from tests.helpers.placed_toy import whole

    parameters = {name: torch.nn.Parameter(whole(name, 0)) for name in gradients}
    for name, p in parameters.items():
        p.grad = gradients[name] * (CLIP / (norm_of(gradients) + 1e-6))
    adam = torch.optim.Adam(parameters.values(), lr=0.1, eps=1e-3)
    adam.step()
    moments = {
        name: {key: value for key, value in adam.state[p].items() if key != "step"}
        for name, p in parameters.items()
    }
    return {name: p.detach() for name, p in parameters.items()}, moments


def router_summed_over_too_few(mesh: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(mesh.groups_by_axes, ("data", "context", "tensor"), mesh.groups_by_axes["data", "context"])


def words_joined_in_equal_parts(mesh: Any, patch: pytest.MonkeyPatch) -> None:
    import fairseq_moe.distributed.joining as joining

    patch.setattr(joining, "_length", lambda cut, index, count: -(-cut.size // count))


def norm_without_copies(mesh: Any, patch: pytest.MonkeyPatch) -> None:
    import fairseq_moe.stock.step.gradients as gradients

    patch.setattr(gradients, "num_copies", lambda placement, ranks: 1)


MUTATIONS = (router_summed_over_too_few, words_joined_in_equal_parts, norm_without_copies)


def mutated(rank: int, sizes: tuple[int, int, int, int]) -> list[tuple[float, Any]]:
    """For each mutation, the norm beside the right one, and which gradients are wrong, or why there are none."""
    from fairseq_moe.errors import RanksDisagreeError
    from tests.helpers.placed_toy import expected_gradients

    mesh, found = mesh_of(sizes), []
    expected = expected_gradients(mesh)
    for mutate in MUTATIONS:
        with pytest.MonkeyPatch.context() as patch:
            mutate(mesh, patch)
            try:
                trainer, toy, norm = stepped(mesh, "whole")
                gradients = joined_gradients(trainer, toy)
            except RanksDisagreeError as error:
                found.append((0.0, str(error)))
                continue
        wrong = [
            name
            for name, grad in expected.items()
            if gradients[name].shape != grad.shape
            or not torch.allclose(gradients[name], grad * (CLIP / (norm + 1e-6)), rtol=1e-9)
        ]
        found.append((norm / norm_of(expected), wrong))
    return found


def test_mutations_are_seen() -> None:
    for too_few, equal_parts, copies in run_ranks(mutated, 4, MESHES["D2T2E4"][1]):
        assert too_few[1].startswith(
            "gradients of the dense parameters differ between ranks 0, 1, 2, 3, which"
        )
        assert equal_parts == (pytest.approx(1.0), ["embed_tokens.weight"])
        assert copies[0] > 1.1
