"""The timeline of a pipeline, the exchange under a recorded load, and a finished run beside its plan: by hand.

Run with ``pytest tests/unit/planner/test_simulations.py``.
"""

import itertools
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from fairseq_moe.errors import ConfigError, MoEError
from fairseq_moe.expert_load.record import LoadRecord, append_record
from fairseq_moe.expert_load.summary import LayerLoad
from fairseq_moe.parallel.ranks import RankGrid
from fairseq_moe.parallel.schedule import bubble_frac
from fairseq_moe.planner.calibrate import compare, comparison_lines
from fairseq_moe.planner.command_line import main
from fairseq_moe.planner.load import exchange_of_layer, load_lines
from fairseq_moe.planner.mapping import Mapping, States
from fairseq_moe.planner.picture import timeline
from fairseq_moe.planner.traffic import spans_nodes
from tests.helpers.published_mappings import mapping, shape


@pytest.mark.parametrize(("pipe", "virtual", "micro_batches"), [(1, 1, 3), (4, 1, 8), (4, 2, 8), (8, 3, 16)])
def test_a_timeline_idles_as_long_as_the_formula_says(pipe: int, virtual: int, micro_batches: int) -> None:
    passes = timeline(pipe, virtual, micro_batches)
    assert len(passes) == 2 * pipe * virtual * micro_batches
    ends = max(end for *_, end in passes)
    for rank in range(pipe):
        own = sorted((begin, end) for number, _, begin, end in passes if number == rank)
        assert all(end <= begin + 1e-9 for (_, end), (begin, _) in itertools.pairwise(own))
        busy = sum(end - begin for begin, end in own)
        assert busy == pytest.approx(3 * micro_batches)
        assert 1 - busy / ends == pytest.approx(float(bubble_frac(pipe, virtual, micro_batches)))


def _load(kept: list[int], wanted: list[int] | None = None) -> LayerLoad:
    return LayerLoad(layer=3, wanted=wanted or kept, kept=kept)


def _exchange(load: LayerLoad, spread: Mapping, **changes: Any) -> Any:
    model = replace(shape("mixtral_8x7b"), **changes)
    return exchange_of_layer(load, model, spread, value_bytes=2, ranks_per_node=4)


def test_a_balanced_load_is_the_plan_s_own() -> None:
    found = _exchange(_load([10] * 8), mapping(8, expert=8))
    assert found.worst_bytes == found.mean_bytes == 4096 * 2 * 4096 * 2
    assert (found.slowdown, found.drop_frac) == (1.0, 0.0)
    assert found.node_frac == 0.5  # four of eight ranks share a node


def test_a_skewed_load_by_hand() -> None:
    # Four ranks of two experts each: the second one's have 60 of 100 rows; a fifth of what was wanted found no place.
    found = _exchange(_load([5, 5, 50, 10, 10, 5, 5, 10], [5, 5, 75, 10, 10, 5, 5, 10]), mapping(4, expert=4))
    assert found.worst_place == 1 and found.slowdown == pytest.approx(2.4)
    assert found.drop_frac == pytest.approx(0.2)
    assert found.mean_bytes == round(4096 * 2 * 0.8 * 4096 * 2)
    assert found.worst_bytes == round(2.4 * 4096 * 2 * 0.8 * 4096 * 2)
    assert found.node_frac == 1.0
    (sentence,) = [line for line in load_lines([found]) if line.startswith("The worst")]
    assert "layer 3: place 1" in sentence and "2.40 times" in sentence


def test_parts_of_experts_send_every_row_to_each() -> None:
    grid = RankGrid(data=8, expert=4, expert_tensor=2)
    spread = replace(mapping(8, expert=4), grid=grid)
    found = _exchange(_load([10] * 8), spread)
    assert found.mean_bytes == 2 * 4096 * 2 * 4096 * 2 and found.node_frac == 0.5


def test_four_thousand_ranks_are_numbers() -> None:
    model, spread = shape("deepseek_v3"), mapping(4096, expert=256)
    counts = [100 + (expert == 7) * 900 for expert in range(256)]
    found = exchange_of_layer(_load(counts), model, spread, value_bytes=2, ranks_per_node=8)
    assert found.worst_place == 7
    assert found.slowdown == pytest.approx(1000 / (sum(counts) / 256))
    assert found.node_frac == pytest.approx(1 / 32)


def test_another_number_of_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="has 4 experts in layer 3, expected the 8"):
        _exchange(_load([1] * 4), mapping(8, expert=8))


@pytest.mark.parametrize(
    ("axes", "crosses"),
    [(("tensor",), False), (("expert", "expert_tensor"), False), (("data",), True), (("pipe",), True)],
)
def test_which_groups_leave_a_node(axes: tuple[str, ...], crosses: bool) -> None:
    spread = mapping(64, pipe=2, tensor=4, expert=8)
    assert spread.states is States.ZERO_1 and spans_nodes(spread, axes, 8) is crosses


def test_a_recorded_load_from_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = [[8, 1, 1, 2]]
    append_record(tmp_path, LoadRecord(split="train", update=5, layers=[1], wanted=counts, kept=counts))
    flags = (
        "--ranks 4 --device cpu --task dummy_lm --dict-size 44 --arch transformer_lm_gpt --criterion moe_cross_entropy "
        "--optimizer adam --lr 1e-4 --batch-size 1 --tokens-per-sample 64 --moe-freq 2 --moe-expert-count 4"
    )
    assert main(["--load", str(tmp_path), *flags.split()]) == 0
    assert "place 0 of the expert axis gets 2.67 times the mean" in capsys.readouterr().out


def _run(folder: Path, *, measured: dict[str, float] | None = None, log: list[str] | None = None) -> Path:
    plan = {"words_per_sec": [100.0, 200.0], "peak_bytes": 1100, "stages": [{"margin_bytes": 100}]}
    (folder / "plan.json").write_text(json.dumps(plan))
    if measured is not None:
        (folder / "measured.json").write_text(json.dumps(measured))
    if log is not None:
        (folder / "train.jsonl").write_text("\n".join(log))
    return folder


def test_a_run_that_was_measured(tmp_path: Path) -> None:
    rate, memory = compare(_run(tmp_path, measured={"words_per_sec": 250.0, "peak_bytes": 900}))
    assert (rate.planned, rate.ratio) == ((100.0, 200.0), 1.25)
    assert (memory.planned, memory.ratio) == ((1000,), 0.9)
    assert [line.split()[-1] for line in comparison_lines([rate, memory])[2:]] == ["1.250", "0.900"]


def test_a_run_that_only_logged(tmp_path: Path) -> None:
    lines = [json.dumps({"wps": str(rate), "cuda_gb_allocated": "0"}) for rate in (10, 20, 150, 170)]
    (found,) = compare(_run(tmp_path, log=["2026-11-28 | INFO | started", *lines[:2], *lines[2:]]))
    assert found.measured == 160.0 and found.ratio == 1.0  # of the last half, within the range


def test_a_run_without_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MoEError, match="neither words per second nor peak memory"):
        compare(_run(tmp_path, log=["nothing"]))


def test_a_bubble_is_a_fraction() -> None:
    assert bubble_frac(4, 8, 16) == Fraction(3, 131)
