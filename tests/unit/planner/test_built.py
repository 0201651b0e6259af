"""Stages are built without memory and compared with the plan; a plan that is wrong by one number is refused."""

from typing import Any

from tests.helpers.ranks import run_ranks

_FLAGS = (
    *("--task", "dummy_lm", "--dict-size", "100", "--criterion", "moe_cross_entropy", "--tokens-per-sample", "16"),
    *("--arch", "transformer_lm_gpt", "--decoder-layers", "4", "--decoder-embed-dim", "16", "--batch-size", "2"),
    *("--decoder-ffn-embed-dim", "32", "--decoder-attention-heads", "4", "--decoder-learned-pos"),
    *("--num-experts", "4", "--optimizer", "adam", "--ddp-backend", "legacy_ddp"),
    *("--pipeline-model-parallel-size", "2", "--update-freq", "2"),
    *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
)  # fmt: skip
_SINKS = ("--attention-sinks", "--attention-window", "4", "--attention-window-layers", "2")


def _built(rank: int, flags: tuple[str, ...], change: dict[str, Any]) -> tuple[list[Any], str]:
    from dataclasses import replace

    from fairseq_moe.errors import MoEError
    from fairseq_moe.planner.built import build_stages, built_lines
    from fairseq_moe.planner.devices import device_named
    from fairseq_moe.planner.reading import read_job

    job = read_job(flags, num_ranks=8, device=device_named("cpu"))
    wrong = replace(job, shape=replace(job.shape, **change))
    try:
        built_lines(wrong)
    except MoEError as error:
        return build_stages(job), str(error)
    return build_stages(job), ""


def test_what_is_built_is_what_is_planned() -> None:
    ((stages, sentence),) = run_ranks(_built, 1, _FLAGS, {"expert_dim": 34})
    assert [stage.rank for stage in stages] == [0, 4]
    assert all(stage.planned == stage.built for stage in stages)
    assert stages[0].planned != stages[1].planned  # the positions and the last norm have one stage each
    assert sentence.startswith("rank 0 builds ")


def test_sinks_are_built_and_planned_on_tensor_ranks_and_stages() -> None:
    ((stages, sentence),) = run_ranks(_built, 1, (*_FLAGS, *_SINKS), {"has_sinks": False})
    assert all(stage.planned == stage.built for stage in stages)
    # Of the stage's two layers, each with two of four heads on this rank.
    assert f"the plan says {stages[0].planned - 2 * 2:,}" in sentence
