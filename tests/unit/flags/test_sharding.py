"""Which states the flags shard, what is refused, and the sentences that say what a run comes to."""

from types import SimpleNamespace
from typing import Any

import pytest

from fairseq_moe.flags.sharding import Sharding, sharding_notes, sharding_of, sharding_problems

OPTIMIZER, ALL = {"use_distributed_optimizer": True}, {"use_torch_fsdp2": True}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}


def config(
    model: dict[str, Any],
    *,
    ranks: int = 2,
    backend: str = "pytorch_ddp",
    optimizer: str = "adam",
    **training: Any,
) -> Any:
    distributed = {"distributed_world_size": ranks, "ddp_backend": backend, **training}
    return SimpleNamespace(
        model=model,
        distributed_training=SimpleNamespace(**distributed),
        optimizer=SimpleNamespace(_name=optimizer),
    )


@pytest.mark.parametrize(
    ("cfg", "kind"),
    [
        (config(OPTIMIZER), Sharding.OPTIMIZER),
        (config(ALL), Sharding.ALL),
        (config(OPTIMIZER, backend="legacy_ddp"), Sharding.OPTIMIZER),
        (config({}), None),
        (config(OPTIMIZER, ranks=1), None),
        (config(ALL, ranks=1), None),
        (config(OPTIMIZER, backend="fully_sharded"), None),
    ],
)
def test_a_flag_shards_on_several_ranks_unless_fairscale_does(cfg: Any, kind: Sharding | None) -> None:
    assert sharding_of(cfg) is kind
    assert sharding_problems(cfg, has_experts=True) == []


@pytest.mark.parametrize(
    ("cfg", "sentence"),
    [
        (config(OPTIMIZER | ALL), "optimizer states; choose one."),
        (config(ALL, backend="fully_sharded"), "both shard parameters; leave one out."),
        (config(OPTIMIZER, optimizer="adafactor"), "--optimizer adafactor looks at whole tensors"),
        (config(ALL, ddp_comm_hook="fp16"), "--ddp-comm-hook fp16 belongs to --ddp-backend pytorch_ddp"),
        (config(ALL, heartbeat_timeout=60), "--heartbeat-timeout 60 is not there with --use-torch-fsdp2"),
    ],
)
def test_what_does_not_go_together_is_refused(cfg: Any, sentence: str) -> None:
    (problem,) = sharding_problems(cfg, has_experts=True)
    assert sentence in problem


def test_all_problems_are_named_at_once() -> None:
    cfg = config(OPTIMIZER | ALL, optimizer="lamb", ddp_comm_hook="fp16", heartbeat_timeout=9)
    assert len(sharding_problems(cfg, has_experts=True)) == 4


@pytest.mark.parametrize("model", [OPTIMIZER, ALL])
def test_dense_models_are_refused_by_one_sentence(model: dict[str, Any]) -> None:
    (problem,) = sharding_problems(config(model), has_experts=False)
    assert "--ddp-backend fully_sharded" in problem
    assert sharding_problems(config({}), has_experts=False) == []


def test_overlap_alone_needs_no_experts_and_no_backend() -> None:
    assert sharding_problems(config(OVERLAP), has_experts=False) == []


@pytest.mark.parametrize(
    ("cfg", "sentence"),
    [
        (
            config(OPTIMIZER),
            "--use-distributed-optimizer shards optimizer states with torch's fully_shard, in place of --ddp-backend "
            "pytorch_ddp.",
        ),
        (
            config(ALL, backend="legacy_ddp"),
            "--use-torch-fsdp2 shards parameters and optimizer states with torch's fully_shard, in place of "
            "--ddp-backend legacy_ddp.",
        ),
        (config(OPTIMIZER, ranks=1), "--use-distributed-optimizer has no effect on one rank"),
        (config(OPTIMIZER, ranks=1, backend="fully_sharded"), "has no effect on one rank"),
        (config(OPTIMIZER, backend="fully_sharded"), "fully_sharded shards optimizer states already."),
    ],
)
def test_what_the_flag_comes_to_is_said_once(cfg: Any, sentence: str) -> None:
    (note,) = sharding_notes(cfg, on_gpu=True)
    assert sentence in note


@pytest.mark.parametrize(
    ("model", "options", "on_gpu", "sums", "gathers"),
    [
        ({}, {"backend": "legacy_ddp"}, True, "after the backward pass", "nothing is gathered"),
        (
            {},
            {"backend": "pytorch_ddp"},
            True,
            "of an expert's replicas come after it",
            "nothing is gathered",
        ),
        ({}, {"backend": "pytorch_ddp"}, False, "on a CPU", "nothing is gathered"),
        ({}, {"backend": "fully_sharded"}, True, "fully_sharded reduces", "fully_sharded gathers"),
        (OPTIMIZER, {}, True, "torch's fully_shard reduces", "torch's fully_shard gathers"),
        (ALL, {"backend": "legacy_ddp"}, True, "torch's fully_shard reduces", "torch's fully_shard gathers"),
        (ALL, {}, False, "on a CPU", "on a CPU"),
        (ALL, {"ranks": 1}, True, "one rank has nobody", "one rank has nobody"),
    ],
)
def test_overlap_says_what_truly_happens(
    model: dict[str, Any], options: dict[str, Any], on_gpu: bool, sums: str, gathers: str
) -> None:
    *_, of_sums, of_gathers = sharding_notes(config(model | OVERLAP, **options), on_gpu=on_gpu)
    assert of_sums.startswith("--overlap-grad-reduce does nothing by itself: ")
    assert sums in of_sums
    assert of_gathers.startswith("--overlap-param-gather does nothing by itself: ")
    assert gathers in of_gathers
