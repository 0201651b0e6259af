"""Megatron's routing on 1, 2 and 4 ranks: losses, norm, every gradient, the step, the expert bias, and what is sent.

Run with ``pytest tests/distributed/test_router_family.py``.

W ranks must equal one process that takes the ranks' batches as the micro-batches of ``--update-freq W``. One loss
is different: the global balance loss of a micro-batch looks at the choices of all ranks in this and the earlier
micro-batches of the update, and a single process, which takes them one after the other, has seen fewer by then. So
it is compared with a single process that is told those counts beforehand.
"""

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.ranks import run_ranks
from tests.helpers.router_family import EXPERTS, GLOBAL, MEGATRON, WIDTH, router_batches, routers
from tests.helpers.updates import assert_equal

ALLGATHER = ("--moe-token-dispatcher-type", "allgather")
PADDED = ("--moe-pad-expert-input-to-capacity",)
EP2 = ("--expert-model-parallel-size", 2)
BIAS = "decoder.layers.1.moe_layer.router.expert_bias"


def _report(trainer: Any, micro_batches: list[Any]) -> dict[str, Any]:
    from tests.helpers.tiny import gradients, parameters, update

    logged = update(trainer, micro_batches)
    found = {"logged": logged, "gradients": gradients(trainer), "parameters": parameters(trainer)}
    bias = [router.expert_bias for router in routers(trainer)]
    return {**found, "bias": [None if bias_E is None else bias_E.clone() for bias_E in bias]}


def _update_on_rank(rank: int, flags: list[Any], world_size: int, num_micro: int) -> dict[str, Any]:
    from tests.helpers.tiny import build_trainer

    return _report(build_trainer(flags), router_batches(rank, world_size, num_micro))


def _update_alone(rank: int, flags: list[Any], world_size: int, num_micro: int) -> dict[str, Any]:
    """The same micro-batches in the order of their rank, each of which takes its own one after the other."""
    from tests.helpers.tiny import build_trainer

    trainer = build_trainer(flags)
    by_rank = [router_batches(other, world_size, num_micro) for other in range(world_size)]
    if "global_aux_loss" in str(flags):
        _tell_global_counts(trainer, by_rank)
    return _report(trainer, [batch for batches in by_rank for batch in batches])


def _tell_global_counts(trainer: Any, by_rank: list[list[Any]]) -> None:
    """Let each micro-batch's global loss see the choices of all ranks up to that micro-batch."""
    model = trainer.get_model().train()
    for router in routers(trainer):
        seen: list[Tensor] = []
        router.rule.global_counts = lambda counts_E, seen=seen: seen.append(counts_E) or counts_E
        router.seen = seen
    with torch.no_grad():
        for batches in by_rank:
            for batch in batches:
                model(**batch["net_input"])
    for router in routers(trainer):
        own = torch.stack(router.seen).view(len(by_rank), -1, router.num_experts)
        told = own.sum(0).cumsum(0).expand_as(own).flatten(0, 1)  # by rank and micro-batch
        upcoming: Iterator[Tensor] = iter(told)
        router.rule.global_counts = lambda counts_E, upcoming=upcoming: next(upcoming)
        router.begin_update()


@functools.cache
def alone(flags: tuple[Any, ...], world_size: int, num_micro: int) -> dict[str, Any]:
    result: dict[str, Any] = run_ranks(_update_alone, 1, list(flags), world_size, num_micro)[0]
    return result


def _assert_ranks_equal_one(flags: tuple[Any, ...], placement: tuple[Any, ...], world_size: int) -> None:
    flags = (*flags, "--update-freq", 2)
    expected = alone(flags, world_size, 2)
    by_rank = run_ranks(_update_on_rank, world_size, [*flags, *placement], world_size, 2)
    for found in by_rank:
        assert_equal(found, expected, drops=True)
        for bias_E, expected_E in zip(found["bias"], expected["bias"], strict=True):
            assert (bias_E is None) == (expected_E is None)
            assert bias_E is None or torch.equal(bias_E, expected_E)
            assert bias_E is None or world_size == 1 or bias_E.any()  # one rank's batches happen to be even


def _backend(name: str) -> tuple[str, str]:
    return ("--ddp-backend", name)


@pytest.mark.parametrize(
    ("world_size", "placement"),
    [
        pytest.param(1, ALLGATHER, id="1-allgather"),
        pytest.param(1, PADDED, id="1-padded"),
        pytest.param(2, _backend("legacy_ddp"), id="2-alltoall"),
        pytest.param(2, (*PADDED, *_backend("pytorch_ddp")), id="2-padded-pytorch_ddp"),
        pytest.param(2, (*ALLGATHER, *_backend("fully_sharded")), id="2-allgather-fully_sharded"),
        pytest.param(4, _backend("legacy_ddp"), id="4-alltoall"),
        pytest.param(4, (*EP2, *_backend("legacy_ddp")), id="4-alltoall-ep2"),
        pytest.param(4, (*EP2, *ALLGATHER, *_backend("legacy_ddp")), id="4-allgather-ep2"),
        pytest.param(4, (*EP2, *PADDED, *_backend("fully_sharded")), id="4-padded-ep2-fully_sharded"),
    ],
)
def test_ranks_equal_one_process_with_every_loss_but_the_global_one(
    world_size: int, placement: tuple[Any, ...]
) -> None:
    """Also ``allgather == alltoall == padded``: the single process takes the default dispatcher."""
    _assert_ranks_equal_one(MEGATRON, placement, world_size)


@pytest.mark.parametrize(
    ("world_size", "placement"),
    [
        pytest.param(1, (), id="1-alltoall"),
        pytest.param(2, _backend("legacy_ddp"), id="2-alltoall"),
        pytest.param(4, (*EP2, *PADDED, *_backend("legacy_ddp")), id="4-padded-ep2"),
        pytest.param(4, (*EP2, *_backend("fully_sharded")), id="4-alltoall-ep2-fully_sharded"),
    ],
)
def test_the_global_loss_sees_all_ranks_up_to_this_micro_batch(
    world_size: int, placement: tuple[Any, ...]
) -> None:
    _assert_ranks_equal_one((*MEGATRON, *GLOBAL), placement, world_size)


def test_the_micro_batches_of_one_process_are_not_those_of_ranks_for_the_global_loss() -> None:
    """What the test above stands on: told nothing, a single process computes something else."""
    flags = (*MEGATRON, *GLOBAL)
    told = alone((*flags, "--update-freq", 2), 2, 2)
    untold = run_ranks(_update_untold, 1, [*flags, "--update-freq", 2])[0]
    assert told["logged"]["moe_global_aux_loss"] != pytest.approx(untold["moe_global_aux_loss"], rel=1e-4)
    assert told["logged"]["moe_aux_loss"] == pytest.approx(untold["moe_aux_loss"], rel=1e-6)


def _update_untold(rank: int, flags: list[Any]) -> dict[str, float]:
    from tests.helpers.tiny import build_trainer, update

    return update(build_trainer(flags), [*router_batches(0, 2, 2), *router_batches(1, 2, 2)])


def test_ranks_agree_on_a_bias_beside_probabilities() -> None:
    softmax = (*MEGATRON, "--moe-router-score-function", "softmax")
    _assert_ranks_equal_one(softmax, _backend("legacy_ddp"), 2)


# --- the expert bias travels with checkpoints ---


def _save(rank: int, flags: list[Any], world_size: int) -> Tensor:
    from fairseq import checkpoint_utils

    from tests.helpers.tiny import build_trainer, update

    trainer = build_trainer(flags)
    for _ in range(3):
        update(trainer, router_batches(rank, world_size, 1))
    epoch = SimpleNamespace(epoch=1, end_of_epoch=lambda: True, state_dict=lambda: {"epoch": 1})
    checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, epoch, None)
    return routers(trainer)[0].expert_bias


def _load(rank: int, flags: list[Any], path: str) -> tuple[Tensor, torch.dtype]:
    from tests.helpers.tiny import build_trainer

    trainer = build_trainer(flags)
    trainer.load_checkpoint(path)
    bias_E = routers(trainer)[0].expert_bias
    return bias_E, bias_E.dtype


def test_a_checkpoint_keeps_the_expert_bias_under_any_other_layout(tmp_path: Any) -> None:
    path = str(tmp_path / "checkpoint_last.pt")
    flags = [*MEGATRON, "--optimizer", "adam", "--save-dir", tmp_path]
    saved = run_ranks(_save, 4, [*flags, *EP2, *_backend("legacy_ddp")], 4)[0]
    assert len(set(saved.tolist())) > 1
    for world_size, placement in ((1, ()), (2, _backend("fully_sharded")), (4, ALLGATHER)):
        for bias_E, dtype in run_ranks(_load, world_size, [*flags, *placement], path):
            assert torch.equal(bias_E, saved)
            assert dtype == torch.float32


# --- what is sent ---


def _count_exchange(rank: int, flags: list[Any], world_size: int) -> dict[str, Any]:
    """Rows and bytes that left this rank in one update, and the rows of which an expert lives elsewhere."""
    from fairseq_moe.distributed import GroupExchange
    from fairseq_moe.distributed import all_to_all as exchange
    from fairseq_moe.stock.find_experts import moe_decoder
    from tests.helpers.tiny import build_trainer, update

    trainer = build_trainer(flags)
    decoder = moe_decoder(trainer.get_model())
    assert decoder is not None and decoder.mesh is not None
    local_ids = decoder.mesh.layout.local_ids(rank)
    place = rank % decoder.mesh.layout.ep_size
    sent: list[tuple[int, int]] = []
    counts: list[int] = []
    needed: list[int] = []
    real_start, real_counts = exchange._Flight.start, GroupExchange.counts

    def start(self: Any, rows_RD: Tensor, collective: Any) -> None:
        remote = sum(collective.send_splits) - collective.send_splits[place]
        sent.append((remote, remote * rows_RD[:1].nbytes if len(rows_RD) else 0))
        real_start(self, rows_RD, collective)

    def own_counts(self: Any, send_GL: Tensor) -> Tensor:
        counts.append(send_GL.numel())
        return real_counts(self, send_GL)

    def note(module: Any, args: Any, output: Any) -> None:
        ids = output.decision.expert_ids_TK[output.decision.kept_TK]
        needed.append(int(((ids < local_ids.start) | (ids >= local_ids.stop)).sum()))

    exchange._Flight.start, GroupExchange.counts = start, own_counts  # type: ignore[method-assign]
    for router in decoder.routers():
        router.register_forward_hook(note)
    update(trainer, router_batches(rank, world_size, 1))
    return {"sent": sent, "counts": counts, "needed": needed}


@pytest.mark.parametrize(("world_size", "more"), [(2, ()), (4, ()), (4, EP2)], ids=["2", "4", "4-ep2"])
def test_only_surviving_rows_of_remote_experts_travel_once_each_way(
    world_size: int, more: tuple[Any, ...]
) -> None:
    """Forward: to the expert and back; backward: the same two with gradients. And E counts per layer."""
    by_rank = run_ranks(_count_exchange, world_size, [*MEGATRON, *more], world_size)
    assert sum(found["needed"][0] for found in by_rank) > 0
    for found in by_rank:
        [needed] = found["needed"]
        assert found["counts"] == [EXPERTS]
        legs = [rows for rows, _ in found["sent"]]
        assert legs[0] == legs[2] == needed  # own rows out, and the gradients of their results
        assert legs[1] == legs[3]  # results of other ranks' rows, and those rows' gradients
        assert [size for _, size in found["sent"]] == [rows * WIDTH * 4 for rows in legs]
    for leg in range(4):  # what all ranks send on any leg is what all ranks need
        assert sum(found["sent"][leg][0] for found in by_rank) == sum(found["needed"][0] for found in by_rank)


@pytest.mark.parametrize(
    ("recompute", "legs"), [("moe", 6), ("experts,shared_experts", 4)], ids=["moe", "parts"]
)
def test_recomputing_the_whole_layer_exchanges_again_and_its_parts_do_not(recompute: str, legs: int) -> None:
    flags = [*MEGATRON, "--moe-recompute-modules", recompute]
    for found in run_ranks(_count_exchange, 2, flags, 2):
        assert len(found["sent"]) == legs
