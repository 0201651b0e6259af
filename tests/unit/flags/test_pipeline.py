"""Pipelines: layers of each rank, the guides' mappings, tasks, and what is said of stages that idle."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from fairseq_moe.errors import ConfigError
from fairseq_moe.flags.moe import MoEConfig
from fairseq_moe.flags.parallel import Axes, ParallelConfig
from fairseq_moe.flags.pipeline_checks import pipeline_notes
from fairseq_moe.parallel.experts import ExpertLayout
from tests.helpers.parallel_flags import P2, P4, T2, V2, ZERO_1, configuration, problems
from tests.helpers.ranks import run_ranks

FIRST, LAST = "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"
PER_STAGE = "num_layers_per_virtual_pipeline_stage"


@pytest.mark.parametrize(
    ("given", "chunks"),
    [
        ({}, [[range(0, 8)]]),
        (P2, [[range(0, 4)], [range(4, 8)]]),
        (P2 | V2, [[range(0, 2), range(4, 6)], [range(2, 4), range(6, 8)]]),
        (P2 | {PER_STAGE: 2}, [[range(0, 2), range(4, 6)], [range(2, 4), range(6, 8)]]),
        (P2 | {PER_STAGE: 4}, [[range(0, 4)], [range(4, 8)]]),
        (P2 | {FIRST: 3}, [[range(0, 3)], [range(3, 8)]]),
        (P4 | {FIRST: 1, LAST: 3}, [[range(0, 1)], [range(1, 3)], [range(3, 5)], [range(5, 8)]]),
        (P2 | V2 | {LAST: 2}, [[range(0, 3), range(4, 7)], [range(3, 4), range(7, 8)]]),
    ],
    ids=str,
)
def test_layers_of_each_rank(given: dict[str, Any], chunks: list[list[range]]) -> None:
    layout = ParallelConfig.from_args(given).stages(8)
    found = [
        [layout.layers_of(rank, chunk) for chunk in range(layout.virtual)] for rank in range(layout.pipe)
    ]
    assert found == chunks


@pytest.mark.parametrize(
    "given", [P2 | V2 | {PER_STAGE: 1}, P2 | {PER_STAGE: 3}, P2 | {PER_STAGE: 0}], ids=str
)
def test_stages_that_are_refused_are_not_made(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--num-layers-per-virtual-pipeline-stage"):
        ParallelConfig.from_args(given).stages(8)


MIXTRAL: dict[str, Any] = {"moe_layer_freq": "1", "num_experts": 8, "moe_router_topk": 2}
# TP1 EP8 PP4 VP8 on 64 ranks; TP4 EP2 PP8 VP7 on 128, each expert divided over as many ranks as all else.
MAPPINGS = [
    (
        "8x7B",
        {
            **MIXTRAL,
            "decoder_layers": 32,
            "decoder_embed_dim": 4096,
            "decoder_ffn_embed_dim": 14336,
            "decoder_attention_heads": 32,
            "decoder_kv_heads": 8,
            "decoder_normalization": "rmsnorm",
            "gated_ffn": True,
            "expert_model_parallel_size": 8,
            "pipeline_model_parallel_size": 4,
        },
        8,
        64,
        Axes(ep_size=8, pipe=4),
    ),
    (
        "8x22B",
        {
            **MIXTRAL,
            "decoder_layers": 56,
            "decoder_embed_dim": 6144,
            "decoder_ffn_embed_dim": 16384,
            "decoder_attention_heads": 48,
            "decoder_kv_heads": 8,
            "decoder_normalization": "rmsnorm",
            "gated_ffn": True,
            "tensor_model_parallel_size": 4,
            "sequence_parallel": True,
            "expert_model_parallel_size": 2,
            "pipeline_model_parallel_size": 8,
        },
        7,
        128,
        Axes(ep_size=2, expert_tensor=4, tensor=4, pipe=8),
    ),
]


@pytest.mark.parametrize("by_layers", [False, True], ids=["by stages", "by layers"])
@pytest.mark.parametrize(
    ("name", "model", "virtual", "ranks", "axes"), MAPPINGS, ids=[name for name, *_ in MAPPINGS]
)
def test_mappings_of_the_guides_are_accepted(
    name: str, model: dict[str, Any], virtual: int, ranks: int, axes: Axes, by_layers: bool
) -> None:
    stages = {PER_STAGE: 1} if by_layers else {"num_virtual_stages_per_pipeline_rank": virtual}
    assert problems(model | stages | ZERO_1, ranks=ranks, update_freq=(2 * axes.pipe,)) == []
    moe = MoEConfig.from_args(model | stages)
    assert moe.axes == axes
    layout = moe.parallel.stages(moe.decoder_layers)
    assert (layout.pipe, layout.virtual) == (axes.pipe, virtual)
    for rank in range(axes.pipe):  # one layer each, every P-th
        held = [layout.layers_of(rank, chunk) for chunk in range(virtual)]
        assert held == [range(n, n + 1) for n in range(rank, moe.decoder_layers, axes.pipe)]
    experts = ExpertLayout(
        num_experts=8,
        world_size=ranks,
        given_ep_size=axes.ep_size,
        expert_tensor=axes.expert_tensor,
        tensor=axes.tensor,
        pipe=axes.pipe,
    )
    assert experts.num_local_experts == 8 // (axes.ep_size or 1)
    grid = experts.ranks
    assert (grid.data, grid.expert_replica) == {"8x7B": (16, 2), "8x22B": (4, 2)}[name]


@pytest.mark.parametrize(
    ("model", "update_freq", "notes"),
    [
        ({}, (1,), []),
        (P2, (2,), []),
        (P2, (3, 8), []),
        (P4, (4, 5), []),
        (P2 | V2, (2, 4), []),
        (
            P2,
            (1,),
            [
                "--update-freq 1 gives --pipeline-model-parallel-size 2 fewer micro-batches than stages, and each rank "
                "idles 50% of an update; raise it to several times 2."
            ],
        ),
        (
            P4,
            (8, 2, 1),
            [
                "--update-freq 1 gives --pipeline-model-parallel-size 4 fewer micro-batches than stages, and each rank "
                "idles 75% of an update; raise it to several times 4."
            ],
        ),
        (
            P4,
            (2,),
            [
                "--update-freq 2 gives --pipeline-model-parallel-size 4 fewer micro-batches than stages, and each rank "
                "idles 60% of an update; raise it to several times 4."
            ],
        ),
        (  # of 2 x 2 passes one way and one slot of waiting, 2 are of words
            P2 | V2,
            (1,),
            [
                "--update-freq 1 gives --pipeline-model-parallel-size 2 fewer micro-batches than stages, and each rank "
                "idles 60% of an update; raise it to several times 2."
            ],
        ),
        (
            P2 | V2,
            (3, 4, 5),
            [
                f"--update-freq {count} is no multiple of --pipeline-model-parallel-size 2, which several stages on "
                f"each rank need: it is filled up to {count + 1} by micro-batches without words; make it a multiple."
                for count in (3, 5)
            ],
        ),
    ],
    ids=str,
)
def test_idle_stages_are_announced(
    model: dict[str, Any], update_freq: tuple[int, ...], notes: list[str]
) -> None:
    cfg = configuration(model, update_freq=update_freq)
    assert problems(model) == []
    assert list(pipeline_notes(cfg)) == notes


def _said_at_the_start(rank: int) -> list[str]:
    import logging

    from fairseq_moe.stock.step.start_log import warn_once

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fairseq_moe").addHandler(handler)
    cfg = configuration(P2, update_freq=(1,))
    cfg.common.cpu = True
    decoder: Any = SimpleNamespace(moe=MoEConfig.from_args(cfg.model))
    warn_once(cfg, decoder, nn.Module())
    return said


def test_idle_stages_are_announced_at_the_start() -> None:
    [said] = run_ranks(_said_at_the_start, 1)
    assert len([line for line in said if line.startswith("--update-freq 1 gives")]) == 1


def _of_tasks(rank: int, cases: list[tuple[dict[str, Any], str]]) -> list[list[str]]:
    from fairseq.tasks import register_task
    from fairseq.tasks.language_modeling import LanguageModelingTask

    from fairseq_moe.stock.start.task_steps import task_step_problems

    def steps(self: Any, *args: Any) -> None:
        pass

    for name in ("train_step", "valid_step"):
        register_task(f"own_{name}")(type(f"Own_{name}", (LanguageModelingTask,), {name: steps}))
    return [task_step_problems(configuration(model, task=task)) for model, task in cases]


def test_a_task_with_steps_of_its_own_is_refused() -> None:
    accepted = [
        (P2, "language_modeling"),
        (P2, "multilingual_language_modeling"),
        (P2, "dummy_lm"),
        (P2, "nobody_knows"),
        ({}, "own_train_step"),
        (T2, "own_valid_step"),
    ]
    refused = [(P2, "own_train_step"), (P4, "own_valid_step")]
    [found] = run_ranks(_of_tasks, 1, accepted + refused)
    assert found[: len(accepted)] == [[]] * len(accepted)
    for (said,), (model, task) in zip(found[len(accepted) :], refused, strict=True):
        assert said == (
            f"--task {task} has a {task[4:]} of its own, and with --pipeline-model-parallel-size "
            f"{model['pipeline_model_parallel_size']} micro-batches go through the stages in fairseq's; use a task "
            "without one, such as language_modeling."
        )
