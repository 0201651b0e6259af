"""Modules sharded over two ranks: a layer that one rank leaves out, and how often parameters are gathered.

Run with ``pytest tests/distributed/test_shards.py``. Whole models: test_sharded_states.py.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.helpers.ranks import RankError, run_ranks


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Any, *, leaves_out: bool) -> Any:
        x = self.first(x)
        return x if leaves_out else self.second(x)


def _leave_a_layer_out(rank: int, reduces_it: bool) -> dict[str, torch.Tensor]:
    from fairseq_moe.distributed.shards import shard_module, shard_of

    torch.manual_seed(1)
    model = TwoLayers()
    shard_module(model, dist.group.WORLD, frees_after_forward=True)
    model.set_reduce_scatter_unused_params(reduces_it)
    shards = {name: shard_of(p, lambda local: None) for name, p in model.named_parameters()}
    model(torch.ones(1, 4), leaves_out=rank == 1).sum().backward()
    for shard in shards.values():
        shard.take_gradient()
    return {name: shard.gather(shard.local.grad) for name, shard in shards.items()}


def test_a_layer_that_one_rank_leaves_out_has_the_mean_of_what_there_is() -> None:
    torch.manual_seed(1)
    model = TwoLayers()
    for leaves_out in (False, True):
        (model(torch.ones(1, 4), leaves_out=leaves_out).sum() / 2).backward()
    for found in run_ranks(_leave_a_layer_out, 2, True):
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[name], p.grad)


def test_without_its_zeros_the_ranks_would_send_different_amounts() -> None:
    with pytest.raises(RankError):
        run_ranks(_leave_a_layer_out, 2, False, timeout=8.0)


def _exchanges(rank: int, *flags: Any) -> dict[str, int]:
    """Count gathers and reductions of one update of three micro-batches."""
    from tests.helpers.tiny import build_trainer, make_batch, update

    counted = {"gathers": 0, "reductions": 0}

    def count(name: str, kind: str) -> None:
        real = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counted[kind] += 1
            return real(*args, **kwargs)

        setattr(dist, name, call)

    for name in ("all_gather_single", "all_gather_into_tensor"):
        count(name, "gathers")
    for name in ("reduce_scatter_single", "reduce_scatter_tensor"):
        count(name, "reductions")
    trainer = build_trainer([*flags, "--update-freq", 3])
    update(trainer, [make_batch(10 * trainer.data_parallel_rank + micro) for micro in range(3)])
    return counted


GATHERS = [("--use-distributed-optimizer", 1), ("--use-torch-fsdp2", 2 * 3)]


@pytest.mark.parametrize(("flag", "gathers"), GATHERS)
def test_parameters_are_gathered_once_per_update_or_twice_per_micro_batch(flag: str, gathers: int) -> None:
    groups = 3  # two layers, and what is around them; each expert is on one rank
    for counted in run_ranks(_exchanges, 2, flag):
        assert counted == {"gathers": gathers * groups, "reductions": groups}


@pytest.mark.parametrize(("flag", "gathers"), GATHERS)
def test_so_they_are_where_there_is_no_second_data_rank(flag: str, gathers: int) -> None:
    """Context ranks gather keys and values as well, so only what the flag adds is counted."""
    groups, shared = 3, ("--context-parallel-size", 2)
    for plain, counted in zip(
        run_ranks(_exchanges, 2, *shared), run_ranks(_exchanges, 2, *shared, flag), strict=True
    ):
        assert counted["gathers"] - plain["gathers"] == gathers * groups
        assert counted["reductions"] - plain["reductions"] == groups
