"""The scripts print the commands they promise and take overrides; bench_layer and demo are right in small.

The commands of the two GPU scripts are those of the README of fairseq's moe branch, flag by flag.
"""

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.helpers.scheduler import Scheduler, Start, write_program

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"

SHARED_FLAGS = """
  --ddp-backend fully_sharded --memory-efficient-fp16 --checkpoint-activations --task dummy_lm
  --arch transformer_lm_gpt --share-decoder-input-output-embed --decoder-attention-heads 32 --moe-freq 2
  --moe-gating-use-fp32 --moe-second-expert-policy all --moe-normalize-expert-grad sqrt_world_size
  --moe-eval-capacity-token-fraction -1.0 --max-sentences-valid 1 --num-workers-valid 0
  --criterion moe_cross_entropy --moe-gate-loss-wt 0.01 --moe-gate-loss-combine-method sum --optimizer adam
  --fp16-adam-stats --adam-betas '(0.9, 0.98)' --clip-norm 0.0 --lr 0.0005 --warmup-updates 750 --dropout 0.1
  --attention-dropout 0.1 --update-freq 1 --max-update 250 --disable-validation --log-format json
  --log-interval 10
"""
SINGLE_NODE = """
  --tokens-per-sample 2048 --decoder-layers 24 --decoder-embed-dim 2048 --decoder-ffn-embed-dim 8192
  --moe-expert-count 8 --batch-size 4
"""
MULTI_NODE = """
  --tokens-per-sample 1024 --decoder-layers 32 --decoder-embed-dim 4096 --decoder-ffn-embed-dim 16384
  --moe-expert-count 64 --batch-size 12 --distributed-port 12345
"""


def command_of(script: str, *overrides: str, **variables: str) -> list[str]:
    """The words of the command that a dry run prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    run = subprocess.run(
        ["bash", str(SCRIPTS / script), *overrides],
        env={**environment, "DRY_RUN": "1", **variables},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert run.stdout.count("\n") == 1
    prompt, *words = shlex.split(run.stdout)
    assert prompt == "$"
    return words


def pairs(words: list[str]) -> set[tuple[str, ...]]:
    """Flags with their values, in no order."""
    starts = [index for index, word in enumerate(words) if word.startswith("--")]
    ends = [*starts[1:], len(words)]
    return {tuple(words[start:end]) for start, end in zip(starts, ends, strict=True)}


def load(script: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(script.removesuffix(".py"), SCRIPTS / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("script", "program", "flags"),
    [
        ("train_single_node.sh", ["fairseq-train"], SINGLE_NODE),
        ("train_multi_node.slurm", ["srun", "--cpu-bind=cores", "fairseq-train"], MULTI_NODE),
    ],
)
def test_a_gpu_script_is_the_branchs_command_and_the_user_dir(
    script: str, program: list[str], flags: str
) -> None:
    words = command_of(script)

    assert words[: len(program)] == program
    expected = pairs(shlex.split(SHARED_FLAGS + flags)) | {("--user-dir", str(ROOT / "fairseq_moe"))}
    assert pairs(words[len(program) :]) == expected


@pytest.mark.parametrize("script", ["train_single_node.sh", "train_multi_node.slurm", "train_cpu.sh"])
def test_overrides_come_last_and_data_replaces_the_dummy_task(script: str) -> None:
    words = command_of(script, "--lr", "0.1", "a b", DATA="data bin")

    assert words[-3:] == ["--lr", "0.1", "a b"]
    assert "data bin" in words
    assert words[words.index("--task") + 1] == "language_modeling"


def test_variables_set_ranks_and_experts() -> None:
    cpu = command_of("train_cpu.sh", RANKS="4", NUM_EXPERTS="8")
    slurm = command_of("train_multi_node.slurm", SLURM_NTASKS="128", SRUN_FLAGS="--label --cpu-bind=none")

    assert cpu[cpu.index("--distributed-world-size") + 1] == "4"
    assert cpu[cpu.index("--moe-expert-count") + 1] == "8"
    assert slurm[:4] == ["srun", "--label", "--cpu-bind=none", "fairseq-train"]
    assert slurm[slurm.index("--moe-expert-count") + 1] == "128"


def test_the_slurm_script_asks_for_64_gpus_and_binds_no_cpus_by_mask() -> None:
    text = (SCRIPTS / "train_multi_node.slurm").read_text()

    for line in ("--nodes=8", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12"):
        assert f"#SBATCH {line}\n" in text
    assert "mask_cpu" not in text


_TRAINER = """\
echo started
[[ "${WAITS:-}" ]] || exit "$CODE"
trap 'echo the rank got TERM; exit "$CODE"' TERM
echo waits
for _ in {1..200}; do sleep 0.1; done
"""


def _slurm_job(folder: Path, *, state: str, term: bool, code: int) -> Start:
    """Run the SLURM script with stubs for SLURM's commands and for training.

    Args:
        folder: an empty directory.
        state: what squeue says of the job.
        term: whether TERM comes while ranks are running.
        code: the exit code of the rank.
    """
    scheduler = Scheduler(
        folder / "slurm", {"JOB_STATE": state, "CODE": str(code), "WAITS": "1" if term else ""}
    )
    write_program(folder / "slurm" / "fairseq-train", _TRAINER)
    (folder / "scripts").symlink_to(SCRIPTS)
    return scheduler.start(
        (SCRIPTS / "train_multi_node.slurm").read_bytes(), ranks=1,
        environ={"SLURM_SUBMIT_DIR": str(folder)}, term_when=(lambda output: "waits" in output) if term else None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("term", "state", "code", "requeued"),
    [
        (True, "RUNNING", 0, True),  # the time limit is near, the ranks have saved
        (True, "CANCELLED", 0, False),
        (True, "RUNNING", 3, False),  # no checkpoint
        (False, "RUNNING", 0, False),  # trained to the end
        (False, "RUNNING", 2, False),
    ],
)
def test_the_slurm_script_queues_again_what_was_stopped_and_saved(
    term: bool, state: str, code: int, requeued: bool, tmp_path: Path
) -> None:
    start = _slurm_job(tmp_path, state=state, term=term, code=code)
    assert (start.exit_code, start.requeued) == (code, requeued), start.output
    assert ("the rank got TERM" in start.output) is term


def test_the_slurm_script_asks_for_a_signal_in_time() -> None:
    text = (SCRIPTS / "train_multi_node.slurm").read_text()
    for line in ("--signal=B:TERM@600", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {line}\n" in text


def test_every_way_of_bench_layer_gives_gradients_and_the_table_has_a_row_per_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    bench = load("bench_layer.py")
    size = bench.Size(tokens=16, model_dim=8, hidden_dim=12, experts=4)
    ways = ["dense, whole", "dense, in chunks", "MoE layer", "loop of Linear"]

    for way in ways:
        module, run = bench.WAYS[way](size)
        x_TD = torch.randn(16, 8, requires_grad=True)
        run(x_TD).backward()
        assert x_TD.grad is not None
        assert all(parameter.grad is not None for parameter in module.parameters())
    result = bench.measure(size, device=torch.device("cpu"), rounds=1, ways=ways)
    assert result["dense limit"]["ratio"] == 1.0
    assert len(bench.table([result, result]).splitlines()) == 4
    json.dumps(result)


def test_every_row_of_bench_routing_runs_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    bench = load("bench_routing.py")
    args = argparse.Namespace(tokens=64, model_dim=8, hidden_dim=8, experts=16, rounds=1)
    results = bench.measure(args)
    assert [row["routing"] for row in results] == list(bench.ROWS)
    assert len(bench.table(results).splitlines()) == 2 + len(bench.ROWS)


def test_bench_save_writes_checkpoints_of_the_size_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    bench = load("bench_save.py")
    content = bench.content_of(1)
    bench.save(content, tmp_path)
    sizes = [path.stat().st_size for path in tmp_path.rglob("*.safetensors")]
    assert len(sizes) == 1 and 0.95 * 2**20 < sizes[0] < 1.05 * 2**20
    seconds = bench.measure(1, tmp_path, rounds=1)
    assert [len(found) for found in seconds.values()] == [1, 1, 1]


def test_bench_train_reads_the_speed_of_the_updates_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    bench = load("bench_train.py")
    line = '2026-01-01 00:00:00 | INFO | train_inner | {{"epoch": 1, "wps": "{}"}}\n'
    log = "other\n" + "".join(line.format(speed) for speed in (1, 2, 30, 50, 40))
    assert bench.speed_of(log) == 40
    rows = bench.summary({bench.DENSE: [10.0, 20.0, 40.0], "8 experts": [5.0, 20.0, 80.0]})
    assert [row["ratio"] for row in rows] == [1.0, 1.0]


def test_the_demos_dense_model_does_as_much_work_per_token_as_its_experts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("sentencepiece")
    monkeypatch.syspath_prepend(SCRIPTS)
    demo = load("demo.py")

    experts = demo.TOP_K * 2 * demo.EMBED_DIM * demo.FFN_DIM
    router = demo.EMBED_DIM * demo.EXPERTS
    assert experts + router == 2 * demo.EMBED_DIM * demo.EQUAL_FLOPS_FFN_DIM


def test_the_demo_cuts_a_text_between_paragraphs_and_loses_nothing(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    demo_text = load("demo_text.py")
    paragraphs = [f"paragraph {number}\n\tof two lines " + "word " * 200 for number in range(100)]
    text = "\n\n".join(paragraphs)
    (tmp_path / "text").write_text(text)

    slices = list(demo_text._slices(tmp_path / "text"))

    assert "".join(slices) == text
    assert len(slices) > 5
    found = [paragraph for each in slices for paragraph in demo_text._paragraphs(each)]
    assert found == [
        paragraph.expandtabs(4).rstrip().replace("\n", demo_text.NEWLINE) for paragraph in paragraphs
    ]


@pytest.mark.slow
def test_bench_versions_compares_two_checkouts(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPTS / "bench_versions.py"]
    run = subprocess.run(
        [*command, ROOT, ROOT, "--rounds", "2"], capture_output=True, text=True, check=True, timeout=110
    )
    rows = [line.split("|") for line in run.stdout.splitlines()[2:]]
    assert len(rows) == 5 and all(0.2 < float(row[2]) < 5 for row in rows)
    refused = subprocess.run(
        [*command, ROOT, tmp_path], capture_output=True, text=True, check=False, timeout=60
    )
    assert refused.returncode == 2 and "give two checkouts" in refused.stderr
