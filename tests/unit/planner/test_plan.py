"""Plans from whole command lines: their numbers, table and JSON, what is refused, and what the search lists.

Run with ``pytest tests/unit/planner/test_plan.py``.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fairseq_moe.planner import device_named, plan
from fairseq_moe.planner.changes import cheapest_changes
from fairseq_moe.planner.command_line import main
from fairseq_moe.planner.making import plan_job
from fairseq_moe.planner.mapping import States
from fairseq_moe.planner.reading import Job, read_job
from fairseq_moe.planner.search import flags_of, judge, mappings, search

_GIB = 1 << 30
_LANGUAGE = "--task language_modeling"
_TRAINING = "--criterion moe_cross_entropy --optimizer adam --lr 1e-4 --batch-size 1"
MIXTRAL = (
    f"{_LANGUAGE} --arch mixtral_8x7b {_TRAINING} --bf16 --tokens-per-sample 4096 --update-freq 16 "
    "--use-distributed-optimizer --pipeline-model-parallel-size 4 "
    "--num-virtual-stages-per-pipeline-rank 8 --expert-model-parallel-size 8"
)
DEEPSEEK = f"{_LANGUAGE} --arch deepseek_v3 {_TRAINING} --bf16 --tokens-per-sample 4096 --update-freq 8"
SMALL = f"--task dummy_lm --dict-size 44 --arch transformer_lm_gpt {_TRAINING} --tokens-per-sample 64"


def job_of(flags: str, ranks: int, *, device: str = "h100", words: int | None = None) -> Job:
    return read_job(flags.split(), num_ranks=ranks, device=device_named(device), num_words=words)


# The branch's two commands (README of fairseq's moe branch), of 50,000 words; by hand (dense / ranks + experts) * 8:
# half-precision weights, gradients and moments.
@pytest.mark.parametrize(
    ("ranks", "experts", "layers", "dim", "heads", "dense", "expert", "total"),
    [
        (8, 8, 24, 2048, 32, 908_423_168, 402_776_064, 4_130_631_680),
        (64, 64, 32, 4096, 32, 4_505_346_048, 2_147_811_328, 17_745_658_880),
    ],
)
def test_the_branch_s_commands(
    ranks: int, experts: int, layers: int, dim: int, heads: int, dense: int, expert: int, total: int
) -> None:
    flags = (
        f"{_LANGUAGE} --arch transformer_lm_gpt {_TRAINING} --share-decoder-input-output-embed "
        f"--decoder-layers {layers} "
        f"--decoder-embed-dim {dim} --decoder-ffn-embed-dim {4 * dim} --decoder-attention-heads {heads} --moe-freq 2 "
        f"--moe-expert-count {experts} --tokens-per-sample 1024 --memory-efficient-fp16 --fp16-adam-stats "
        "--ddp-backend fully_sharded --checkpoint-activations"
    )
    found = plan(flags.split(), num_ranks=ranks, device=device_named("a100-80"), num_words=50_000)
    assert (dense // ranks + expert) * 8 == total
    assert [stage.states for stage in found.stages] == [total]
    assert found.total_parameters == dense + expert * ranks


@pytest.fixture(scope="module")
def mixtral() -> Any:
    return plan(MIXTRAL.split(), num_ranks=64, device=device_named("h100"))


def test_the_table_has_every_stage_axis_and_verdict(mixtral: Any) -> None:
    lines = mixtral.table().splitlines()
    assert lines[0] == "mixtral_8x7b: 46,702,792,704 parameters, 12,879,925,248 per token"
    assert lines[1] == "64 x h100, P4 V8 D16 E8 ZeRO-1, counted as ours"
    stages = [line.split() for line in lines if re.match(r"\d+ \(rank \d+\)", line)]
    assert [(row[0], row[2]) for row in stages] == [("0", "0)"), ("1", "16)"), ("2", "32)"), ("3", "48)")]
    for row, stage in zip(stages, mixtral.stages, strict=True):
        sizes = [float(cell) for cell in (*row[6:11], *row[12:])]
        assert sizes[-1] == pytest.approx(stage.total / _GIB, abs=0.006)
        assert sum(sizes[:-1]) == pytest.approx(sizes[-1], abs=0.06)
    axes = [line for line in lines if line.endswith(("in a node", "between nodes"))]
    assert [line.split("  ")[0] for line in axes] == [
        "expert x expert_tensor",
        "pipe",
        "data",
        "expert_replica",
    ]
    assert any(line.startswith("Work: 79.706456 GFLOP per token") for line in lines)
    assert any(line == "Idle: 2.29% of an update" for line in lines)
    assert re.fullmatch(r"Fits: [\d.]+ of 79.10 GiB\.", lines[-1])


def test_stages_that_are_alike_are_shown_once() -> None:
    flags = f"{MIXTRAL} --update-freq 1".replace("--num-virtual-stages-per-pipeline-rank 8", "")
    found = plan(flags.split(), num_ranks=64, device=device_named("h100"))
    shown = [line for line in found.table().splitlines() if re.match(r"\d+ \(rank \d+\)", line)]
    assert len(found.stages) == 4 and len(shown) == 3


def test_json_keeps_its_keys(mixtral: Any) -> None:
    found = json.loads(json.dumps(mixtral.as_json()))
    assert list(found) == [
        "schema", "arch", "mapping", "like", "device", "num_ranks", "total_parameters", "active_parameters", "stages",
        "sent", "bubble_frac", "flops_per_token", "hardware_flops_per_token", "update_tokens", "step_sec",
        "words_per_sec", "peak_bytes", "fits", "notes", "changes",
    ]  # fmt: skip
    assert list(found["stages"][0]) == [
        "pipe", "rank", "layers", "num_parameters", "parameters_bytes", "gradients_bytes", "optimizer_bytes",
        "gathered_bytes", "activations_bytes", "passes_in_flight", "logits_bytes", "exchange_bytes", "margin_bytes",
        "total_bytes",
    ]  # fmt: skip
    assert list(found["sent"][0]) == ["axis", "what", "bytes_per_update", "crosses_nodes"]
    assert found["schema"] == 1 and found["fits"] is True and found["peak_bytes"] == mixtral.peak_bytes
    assert found["update_tokens"] == 256 * 4096
    assert found["step_sec"][0] < found["step_sec"][1]


def test_like_megatron() -> None:
    found = plan(MIXTRAL.split(), num_ranks=64, device=device_named("h100"), like="megatron")
    assert found.stages[0].states == 20_063_312_640
    assert found.stages[0].activations / _GIB == pytest.approx(32.29, abs=0.005)
    assert "counted as megatron" in found.table()


def test_a_rank_of_a_few_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "CPU", *SMALL.split()]) == 0
    said = capsys.readouterr()
    assert said.err == "" and said.out.startswith("transformer_lm_gpt: ") and "1 x cpu, one rank" in said.out


BAD = {
    "no such device": (["--device", "h10", *SMALL.split()], ["the nearest is h100."]),
    "no such flag": ([*SMALL.split(), "--no-such-flag"], ["unrecognized arguments: --no-such-flag."]),
    "several at once": (
        [*SMALL.split(), "--moe-freq", "-1", "--use-distributed-optimizer"],
        ["--moe-freq is -1", "--use-distributed-optimizer shards models with experts"],
    ),
    "ranks that do not divide": (
        ["--ranks", "3", *MIXTRAL.split()],
        ["--pipeline-model-parallel-size is 4, expected a divisor of the 3 ranks."],
    ),
    "no words": (
        [*SMALL.replace("--task dummy_lm --dict-size 44", _LANGUAGE).split()],
        ["give --vocabulary."],
    ),
    "no batch": (
        SMALL.replace("--batch-size 1", "").split(),
        ["neither --batch-size nor --max-tokens is given"],
    ),
    "an optimizer of other states": (
        SMALL.replace("adam", "adafactor").replace("--lr 1e-4", "").split(),
        ["--optimizer is adafactor"],
    ),
    "a picture without an ending": (
        [*SMALL.split(), "--picture", "/no/picture"],
        ["--picture is '/no/picture', expected a file that ends in .png, .svg or .pdf."],
    ),
    "no model": ([], ["no model is named; give --arch"]),
    "a model that there is not": (
        SMALL.replace("transformer_lm_gpt", "mixtral").split(),
        ["--arch/-a is 'mixtral', which there is not; the nearest are mixtral_8"],
    ),
    "no task": (
        SMALL.replace("--task dummy_lm --dict-size 44", "").split(),
        ["--task is not given, and stock's is translation: give --task language_modeling"],
    ),
    "a value that stock evaluates": ([*SMALL.split(), "--update-freq", "[1"], ["(SyntaxError: "]),
    "no such directory of code": (
        [*SMALL.split(), "--user-dir", "/no/code"],
        ["(FileNotFoundError: /no/code)"],
    ),
    "a value that hydra reads otherwise": (
        [*SMALL.split(), "--save-dir", "${}"],
        ["the flags cannot be read ("],
    ),
    "a directory without words": (
        ["/no/data", *SMALL.replace("--task dummy_lm --dict-size 44", _LANGUAGE).split()],
        ["there is no /no/data/dict.txt; name a directory that fairseq-preprocess has written"],
    ),
    "sizes below 1": (
        f"{SMALL} --decoder-embed-dim 0 --decoder-attention-heads 0 --update-freq 0 --tokens-per-sample -5".split(),
        [
            "--decoder-embed-dim is 0, expected at least 1.",
            "--decoder-attention-heads is 0, expected",
            "--update-freq is 0, expected",
            "--tokens-per-sample is -5, expected",
        ],
    ),
    "no rank": (["--ranks", "0", *SMALL.split()], ["the number of ranks is 0"]),
    "no run": (["--calibrate", "/no/such/directory"], ["cannot read /no/such/directory/plan.json"]),
    "no record": (["--load", "/no/such/record", *SMALL.split()], ["no load record at /no/such/record"]),
    "scales that are not counted": ([*SMALL.split(), "--scale-heads"], ["--scale-heads changes parts"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_sentences(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected = BAD[name]
    assert main(arguments) == 2
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert (said.out == "" or "--picture" in arguments) and len(lines) >= len(expected)
    for line in lines:
        assert line.startswith("fairseq-moe-plan: error: ") and line.endswith(".")
    for sentence in expected:
        assert any(sentence in line for line in lines), lines


def _calibrated(folder: Path, plan_text: str, log: str = "") -> int:
    (folder / "plan.json").write_text(plan_text)
    (folder / "train.jsonl").write_text(log)
    return main(["--calibrate", str(folder)])


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"words_per_sec": 3, "peak_bytes": 4, "stages": []}',
        '{"words_per_sec": [0, 0], "peak_bytes": 4, "stages": [{"margin_bytes": 1}]}',
        "[",
        "[" * 100_000,
        "[]",
    ],
)
def test_a_damaged_plan_is_one_sentence(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _calibrated(tmp_path, text, '{"wps": "9"}\n') == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "plan.json is damaged" in line or "plan.json is not a plan of this version" in line


def test_numbers_of_a_log_that_are_none_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_text = '{"words_per_sec": [1, 2], "peak_bytes": 4, "stages": [{"margin_bytes": 1}]}'
    assert _calibrated(tmp_path, plan_text, '{"wps": "soon"}\n{"wps": [1]}\n{"wps": "4"}\n') == 0
    assert "2.000" in capsys.readouterr().out


def test_what_does_not_fit_gets_three_changes_that_make_it_fit() -> None:
    device = device_named("h100")
    job = job_of(MIXTRAL.replace("--update-freq 16", "--update-freq 16 --batch-size 2"), 64)
    found = plan(MIXTRAL.replace("--batch-size 1", "--batch-size 2").split(), num_ranks=64, device=device)
    assert not found.fits and len(found.changes) == 3
    assert "What would make it fit, cheapest first:" in found.table()
    assert any("--moe-recompute-modules experts" in change for change in found.changes)
    seconds = [float(re.findall(r"([\d.e+]+) to ", change)[-1]) for change in found.changes]
    assert seconds[0] == min(seconds)
    assert cheapest_changes(job, device) == found.changes


def test_a_model_that_no_mapping_fits_needs_more_ranks() -> None:
    found = plan(DEEPSEEK.split(), num_ranks=8, device=device_named("a100-40"))
    assert not found.fits
    assert found.changes == ("no mapping of 8 ranks fits: take more ranks, or a larger device.",)


def test_deepseek_on_1024_ranks_is_searched_whole() -> None:
    device = device_named("h100")
    job = job_of(DEEPSEEK, 1024)
    admitted = list(mappings(job.shape, job.mapping))
    assert len(set(map(repr, admitted))) == len(admitted) == 3582
    found = search(job, device)
    assert found.num_mappings == 3582 and 0 < found.num_fitting < 3582
    assert len(found.best) == 5
    seconds = [each.seconds for each in found.best]
    assert seconds == sorted(seconds)
    for each in found.best:
        assert each.mapping.update_tokens == job.mapping.update_tokens
        # What fairseq-train's own checks and the parsed flags make of it is the same mapping.
        planned = job_of(f"{DEEPSEEK} {' '.join(flags_of(each.mapping))}", 1024)
        assert planned.mapping == each.mapping
        whole = plan_job(planned, device=device)
        assert whole.fits and whole.peak_bytes == each.peak_bytes


def test_every_admitted_mapping_passes_our_checks() -> None:
    job = job_of(MIXTRAL, 64)
    admitted = list(mappings(job.shape, job.mapping))
    axes = {(each.grid, each.virtual, each.first, each.last) for each in admitted}
    assert job.mapping in admitted and len(axes) > 100
    kinds = {each.states for each in admitted}
    assert kinds == {States.COPIED, States.ZERO_1, States.ZERO_3}
    plain = MIXTRAL.split("--use-distributed-optimizer")[0]
    for each in admitted[:: len(admitted) // 5]:
        assert job_of(f"{plain} {' '.join(flags_of(each))}", 64).mapping == each


def test_of_two_mappings_the_one_that_fits_has_a_time() -> None:
    job = job_of(MIXTRAL, 64)
    assert judge(job, job.mapping, device_named("h100")).time is not None
    assert judge(job, job.mapping, device_named("a100-40")).time is None


def test_the_search_s_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "--ranks",
                "8",
                "--search",
                "--json",
                *SMALL.split(),
                "--moe-freq",
                "2",
                "--moe-expert-count",
                "8",
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["num_fitting"] <= found["num_mappings"] and found["best"][0]["flags"]
    assert "GiB" in found["best"][0]["reasons"]


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_picture_is_written(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"plan.{suffix}"
    assert main(["--device", "cpu", "--picture", str(path), *SMALL.split()]) == 0
    begins = path.read_bytes()[:200]
    assert begins.startswith(b"\x89PNG") if suffix == "png" else b"<svg" in path.read_bytes()[:2000]
    assert capsys.readouterr().err == f"picture: {path}\n"
