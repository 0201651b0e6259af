"""Stages are built without memory and compared with the plan; a plan that is wrong by one number is refused."""

import contextlib
import io
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


# As gpt-oss: each network and router has biases.
_GPT_OSS = (
    *("--decoder-normalization", "rmsnorm", "--position-embedding", "rope", "--gated-ffn", "--gated-ffn-bias"),
    *("--swiglu-limit", "7", "--moe-router-bias", "--moe-layer-freq", "[0,1]*2"),
    *("--moe-shared-expert-intermediate-size", "12"),
)  # fmt: skip


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


def _command(rank: int, flags: tuple[str, ...]) -> tuple[int, str]:
    from fairseq_moe.planner.command_line import main

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main(["--ranks", "8", "--device", "cpu", "--build", *_FLAGS, *flags])
    return code, printed.getvalue()


def _numbers(printed: str) -> list[list[int]]:
    """Read planned and built numbers of each stage."""
    lines = [line.split() for line in printed.splitlines() if line.startswith(("rank 0 ", "rank 4 "))]
    return [[int(word.replace(",", "")) for word in words[2:]] for words in lines]


def test_biases_of_gated_networks_and_of_routers_are_planned() -> None:
    without = tuple(flag for flag in _GPT_OSS if flag not in ("--gated-ffn-bias", "--moe-router-bias"))
    found = [run_ranks(_command, 1, flags)[0] for flags in (_GPT_OSS, without)]
    assert [code for code, _ in found] == [0, 0]
    biased, plain = (_numbers(printed) for _, printed in found)
    # A rank of a stage has half of one dense network, halves of 2 of 4 experts, a shared network and a router.
    biases = (2 * 32 // 2 + 16) + 2 * (2 * 32 // 2 + 16) + (2 * 12 + 16) + 4
    assert len(biased) == 2
    assert biased == [[number + biases for number in stage] for stage in plain]


def test_sinks_are_built_and_planned_on_tensor_ranks_and_stages() -> None:
    ((stages, sentence),) = run_ranks(_built, 1, (*_FLAGS, *_SINKS), {"has_sinks": False})
    assert all(stage.planned == stage.built for stage in stages)
    # Of the stage's two layers, each with two of four heads on this rank.
    assert f"the plan says {stages[0].planned - 2 * 2:,}" in sentence
