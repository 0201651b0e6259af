"""One norm over the gradients of all ranks, and one verdict about a non-finite one.

Run with ``pytest tests/distributed/test_grad_norm.py``.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fairseq_moe.parallel.placement import EXPERT, is_expert, place
from fairseq_moe.parallel.ranks import RankGrid
from tests.helpers.backends import BACKENDS
from tests.helpers.ranks import run_ranks

BAD_UPDATE = 2  # the third
BAD_RANK = 1


def _parameter(gradient: list[float], *, expert: bool = False) -> Tensor:
    parameter = torch.nn.Parameter(torch.zeros(len(gradient)))
    parameter.grad = torch.tensor(gradient)
    if expert:
        place([parameter], EXPERT)
    return parameter


def _clip_by_hand(rank: int, max_norm: float) -> tuple[float, list[float], list[float]]:
    from fairseq_moe.stock.step.gradients import GradNorm

    # Two experts on four ranks: each has two replicas, with equal gradients.
    dense, expert = _parameter([1.0, 2.0]), _parameter([[2.0, 4.0], [4.0, 8.0]][rank % 2], expert=True)
    norm = GradNorm(RankGrid(data=4, expert=2)).clip([dense, expert], max_norm)
    assert dense.grad is not None
    assert expert.grad is not None
    return float(norm), dense.grad.tolist(), expert.grad.tolist()


def test_norm_counts_dense_gradients_and_each_expert_once() -> None:
    expected = math.sqrt((1 + 4) + (4 + 16) + (16 + 64))
    for rank, (norm, dense, expert) in enumerate(run_ranks(_clip_by_hand, 4, 0.0)):
        assert norm == pytest.approx(expected)
        assert dense == [1.0, 2.0]
        assert expert == [[2.0, 4.0], [4.0, 8.0]][rank % 2]


def test_clipping_scales_dense_and_expert_gradients_alike() -> None:
    scale = 0.5 / math.sqrt(105)
    for rank, (_, dense, expert) in enumerate(run_ranks(_clip_by_hand, 4, 0.5)):
        assert dense == pytest.approx([scale, 2 * scale], rel=1e-5)
        assert expert == pytest.approx([value * scale for value in [[2, 4], [4, 8]][rank % 2]], rel=1e-5)


def _only_experts(rank: int) -> float:
    from fairseq_moe.stock.step.gradients import GradNorm

    return float(GradNorm(RankGrid(data=1)).clip([_parameter([3.0], expert=True)], 0.0))


def test_norm_of_experts_alone_is_not_zero() -> None:
    assert run_ranks(_only_experts, 1) == [3.0]


def _spoil_gradient(trainer: Any, value: float, *, expert: bool) -> None:
    """At the third update, one element of one gradient of one rank is ``value`` after the backward pass."""
    from fairseq_moe.distributed import rank

    reduce = trainer.optimizer.all_reduce_grads
    held = zip(trainer.get_model().parameters(), trainer.model.parameters(), strict=True)
    own = [p for p, stepped in held if is_expert(stepped) is expert]

    def reduce_spoilt(module: Any) -> None:
        if trainer.get_num_updates() == BAD_UPDATE and rank() == BAD_RANK % trainer.data_parallel_world_size:
            grad = own[0].grad
            (grad.to_local() if isinstance(grad, DTensor) else grad).view(-1)[0] = value
        reduce(module)

    trainer.optimizer.all_reduce_grads = reduce_spoilt


def _state(trainer: Any) -> dict[str, Tensor]:
    """Parameters of this rank, their copies in float32 where there are any, and the optimizer's moments."""
    state = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for index, parameter in enumerate(getattr(trainer.optimizer, "fp32_params", [])):
        state[f"{index} in float32"] = parameter.detach().clone()
    for index, entry in trainer.optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            state[f"{index} {key}"] = torch.as_tensor(value).clone()
    return state


def _run_into_bad_gradient(
    rank: int, flags: list[Any], save_dir: str, value: float, expert: bool, mutation: bool = False
) -> dict[str, Any]:
    from tests.helpers.tiny import build_trainer, make_batch, update

    if mutation:
        _leave_experts_out()
    trainer = build_trainer(["--optimizer", "adam", "--lr", 0.01, "--save-dir", save_dir, *flags])
    _spoil_gradient(trainer, value, expert=expert)
    for step in range(BAD_UPDATE):
        update(trainer, [make_batch(step + 10 * rank)])
    before = _state(trainer)
    scale = trainer.optimizer.scaler.loss_scale if trainer.cfg.common.fp16 else None
    outcome = "stepped" if update(trainer, [make_batch(rank)]) else "skipped"
    after = _state(trainer)
    changed = [name for name, tensor in before.items() if not torch.equal(after[name], tensor)]
    found = {"outcome": outcome, "changed": changed, "updates": trainer.get_num_updates()}
    if scale is not None:
        found["scale"] = trainer.optimizer.scaler.loss_scale / scale
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_bad_expert_gradient_of_one_rank_makes_all_ranks_skip_the_update(
    backend: str, value: float, tmp_path: Path
) -> None:
    flags = BACKENDS[backend]
    for found in run_ranks(_run_into_bad_gradient, 2, flags, str(tmp_path), value, True, timeout=40):
        assert found == {"outcome": "skipped", "changed": [], "updates": BAD_UPDATE}


@pytest.mark.parametrize(
    "precision",
    [
        ["--fp16", "--fp16-no-flatten-grads"],
        ["--memory-efficient-fp16"],
        ["--fp16", "--ddp-backend", "fully_sharded"],
        ["--fp16", "--fp16-no-flatten-grads", "--use-torch-fsdp2"],
    ],
    ids=["fp16", "memory-efficient-fp16", "fully-sharded-fp16", "zero3-fp16"],
)
@pytest.mark.parametrize("world_size", [1, 4])
def test_overflow_in_one_expert_skips_the_update_on_all_ranks(
    precision: list[str], world_size: int, tmp_path: Path
) -> None:
    flags = [*precision, "--moe-expert-count", 2, "--fp16-scale-tolerance", 0.0]
    results = run_ranks(_run_into_bad_gradient, world_size, flags, str(tmp_path), math.inf, True, timeout=40)
    for found in results:
        assert found == {"outcome": "skipped", "changed": [], "updates": BAD_UPDATE, "scale": 0.5}


def test_bad_dense_gradient_makes_all_ranks_skip_the_update(tmp_path: Path) -> None:
    flags = ["--ddp-backend", "legacy_ddp"]
    for found in run_ranks(_run_into_bad_gradient, 2, flags, str(tmp_path), math.nan, False, timeout=40):
        assert found == {"outcome": "skipped", "changed": [], "updates": BAD_UPDATE}


def _leave_experts_out() -> None:
    import fairseq_moe.stock.step.gradients as gradients

    total = gradients.GradNorm._total
    gradients.GradNorm._total = lambda self, params, device: total(
        self, [p for p in params if not is_expert(p)], device
    )


def test_these_tests_see_a_norm_that_leaves_experts_out(tmp_path: Path) -> None:
    by_rank = run_ranks(_run_into_bad_gradient, 2, [], str(tmp_path), math.inf, True, True, timeout=40)
    assert [found["outcome"] for found in by_rank] == ["stepped", "stepped"]


def _disagree(rank: int, save_dir: str, expert: bool, flags: list[Any]) -> str:
    from fairseq_moe.errors import RanksDisagreeError
    from tests.helpers.tiny import build_trainer, make_batch, update

    trainer = build_trainer(["--save-dir", save_dir, *flags])
    own = next(p for p in trainer.get_model().parameters() if is_expert(p) is expert)
    reduce = trainer.optimizer.all_reduce_grads

    def reduce_wrongly(module: Any) -> None:
        reduce(module)
        if rank == BAD_RANK:
            own.grad.mul_(1.01)

    trainer.optimizer.all_reduce_grads = reduce_wrongly
    with pytest.raises(RanksDisagreeError) as caught:
        update(trainer, [make_batch(rank)])
    return str(caught.value)


def test_dense_gradients_that_differ_between_ranks_stop_all_ranks(tmp_path: Path) -> None:
    for message in run_ranks(_disagree, 2, str(tmp_path), False, [], timeout=40):
        assert message.startswith(
            "gradients of the dense parameters differ between ranks 0, 1, which hold copies"
        )


def test_gradients_of_an_experts_replicas_that_differ_stop_all_ranks(tmp_path: Path) -> None:
    flags = ["--moe-expert-count", 2]  # ranks 0 and 2 hold the one, 1 and 3 the other
    for message in run_ranks(_disagree, 4, str(tmp_path), True, flags, timeout=40):
        assert message.startswith("gradients of an expert differ between ranks 1, 3, which hold copies")
