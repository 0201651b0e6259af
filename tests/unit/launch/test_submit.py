"""What is submitted or run is what is printed; a run's directory says what it was, and is no other run's."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fairseq_moe.errors import ConfigError
from fairseq_moe.launch import run_directory
from fairseq_moe.launch.job import Cluster, Container, Job
from fairseq_moe.launch.measured import main, write_measured
from fairseq_moe.launch.render import render
from fairseq_moe.launch.run_directory import write_run_directory
from fairseq_moe.launch.submit import submit
from tests.helpers.jobs import plain_job
from tests.helpers.ranks import REPOSITORY, run_ranks
from tests.helpers.scheduler import Scheduler, write_program

_PLAN = '{"words_per_sec": [1.0, 2.0], "step_sec": [3.0, 4.0], "peak_bytes": 5, "more": 6}'
_TEXTS = {
    "resolved.yaml": "lr: 0.1\n",
    "plan.txt": "a table\n",
    "plan.json": _PLAN,
    "origins.txt": "lr: recipe\n",
}


def _local(folder: Path, program: str) -> Job:
    path = write_program(folder / "program", program)
    return replace(
        plain_job("local", "none", folder / "run", (str(path), "--arch", "tiny")), ranks_per_node=1
    )


@pytest.fixture
def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    """SLURM's stubs, first in PATH."""
    stubs = Scheduler(tmp_path / "slurm")
    for name, value in stubs.environ.items():
        monkeypatch.setenv(name, value)
    return stubs


def test_sbatch_gets_the_bytes_that_are_printed(
    scheduler: Scheduler, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = plain_job("sbatch", "pyxis", tmp_path / "it's a run")
    assert submit(job, _TEXTS) == 0
    assert scheduler.submitted == [render(job).encode()] == [(job.run_dir / "job.sh").read_bytes()]
    assert scheduler.said("sbatch") == ["--parsable"]
    assert capfd.readouterr().out == f"submitted job 17 (1 of 1): {job.run_dir}/logs/17.log\n"
    assert (job.run_dir / "logs").is_dir()  # or SLURM drops the output


def test_each_job_of_a_chain_waits_for_the_one_before(scheduler: Scheduler, tmp_path: Path) -> None:
    job = replace(plain_job("sbatch", "none", tmp_path / "run"), chain=3)
    assert submit(job) == 0
    assert scheduler.submitted == [render(job).encode()] * 3
    after = "--parsable --dependency=afterany"
    assert scheduler.said("sbatch") == ["--parsable", f"{after}:17", f"{after}:18"]


def test_a_refused_submission_says_how_far_it_came(
    scheduler: Scheduler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SBATCH_TAKES", "1")
    assert submit(replace(plain_job("sbatch", "none", tmp_path / "run"), chain=3)) == 3
    assert "sbatch has ended with 3; 1 of 3 jobs are submitted." in capfd.readouterr().err


def test_without_sbatch_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="sbatch is not found"):
        submit(plain_job("sbatch", "none", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["command", "env", "image", "setup", "resolved.yaml"])
def test_the_value_of_a_secret_is_written_nowhere(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k3y")
    job, texts = _local(tmp_path, "true\n"), dict(_TEXTS)
    if place == "command":
        job = replace(job, command=(*job.command, "--key=k3y"))
    elif place == "env":
        job = replace(job, env={"OTHER": "k3y"})
    elif place == "image":
        job = replace(job, container=Container(kind="docker", image="docker://me:k3y@here/image"))
    elif place == "setup":
        job = replace(job, cluster=Cluster(setup=("export KEY=k3y",)))
    else:
        texts[place] = "key: k3y"
    with pytest.raises(ConfigError, match="holds the value of WANDB_API_KEY") as raised:
        submit(job, texts)
    assert "k3y" not in str(raised.value)
    assert not job.run_dir.exists()


def test_ranks_inherit_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k3y")
    job = _local(tmp_path, 'echo "got $WANDB_API_KEY" | tr 3 E\n')
    assert submit(job) == 0
    assert "got kEy" in capfd.readouterr().out
    assert not [path for path in job.run_dir.rglob("*") if path.is_file() and "k3y" in path.read_text()]


_RECORD = (
    'echo \'2026 | INFO | train_inner | {{"epoch": 1, "wps": "{wps}", "num_updates": "{update}"{more}}}\'\n'
)


def test_a_local_run_is_shown_kept_and_measured(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    updates = [_RECORD.format(wps=wps, update=n, more="") for n, wps in enumerate((1, 30, 50, 40), start=1)]
    job = _local(tmp_path, "".join(updates) + "echo out; echo err >&2\n")
    assert submit(job, _TEXTS) == 0
    shown = capfd.readouterr().out
    assert shown.endswith("out\nerr\n")
    assert (job.run_dir / "logs/local.log").read_text() == shown
    assert {path.name: path.read_text() for path in job.run_dir.iterdir() if path.name in _TEXTS} == _TEXTS
    assert json.loads((job.run_dir / "measured.json").read_text()) == {
        "updates": 4, "words_per_sec": 40.0, "peak_bytes": None,
        "planned": {"words_per_sec": [1.0, 2.0], "step_sec": [3.0, 4.0], "peak_bytes": 5},
    }  # fmt: skip


@pytest.mark.parametrize(("program", "code"), [("exit 3\n", 3), ("kill -9 $$\n", 137)])
def test_the_exit_code_is_the_runs(program: str, code: int, tmp_path: Path) -> None:
    assert submit(_local(tmp_path, program)) == code


def test_commands_of_this_installation_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    job = replace(
        _local(tmp_path, "true\n"), command=("python", "-S", "-c", "import sys; print(sys.executable)")
    )
    assert submit(job) == 0
    assert (job.run_dir / "logs/local.log").read_text() == f"{Path(sys.executable).parent / 'python'}\n"


def _told_to_stop(rank: int, folder: str) -> int:
    """Run a job that ends at TERM, and get TERM once it says that it is ready."""
    job = _local(
        Path(folder), "trap 'echo saved; exit 0' TERM\necho ready\nfor _ in {1..400}; do sleep 0.05; done\n"
    )
    log = job.run_dir / "logs/local.log"

    def stop() -> None:
        while not (log.exists() and "ready" in log.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    return submit(job)


def test_term_reaches_the_run_and_is_waited_for(tmp_path: Path) -> None:
    assert run_ranks(_told_to_stop, 1, str(tmp_path)) == [0]
    assert (tmp_path / "run/logs/local.log").read_text() == "ready\nsaved\n"


def test_the_directory_says_what_the_run_was(tmp_path: Path) -> None:
    import torch

    job = _local(tmp_path, "true\n")
    write_run_directory(job, _TEXTS)
    found = json.loads((job.run_dir / "versions.json").read_text())
    assert found["run"] == {"name": "tiny", "arch": "tiny"}
    assert found["torch"] == torch.__version__
    assert found["cuda"] == torch.version.cuda
    assert found["python"] == sys.version.split()[0]
    commit = subprocess.run(
        ["git", "-C", REPOSITORY, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    assert (found["commit"] or "").removesuffix("-dirty") == commit.stdout.strip()
    assert (job.run_dir / "command.sh").read_text() == f"{job.command[0]} \\\n  --arch tiny\n"
    write_run_directory(job, {**_TEXTS, "resolved.yaml": "lr: 0.2\n"})  # goes on
    assert (job.run_dir / "resolved.yaml").read_text() == "lr: 0.2\n"


def test_a_directory_of_another_run_is_left_alone(tmp_path: Path) -> None:
    job = _local(tmp_path, "true\n")
    write_run_directory(job, _TEXTS)
    for other in (replace(job, name="other"), replace(job, command=(*job.command, "--arch", "large"))):
        with pytest.raises(ConfigError, match=r"is the directory of run 'tiny' \(--arch tiny\), not of"):
            write_run_directory(other, {"resolved.yaml": "other"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="does not say of which run"):
        write_run_directory(replace(job, run_dir=tmp_path / "mine"), {})
    with pytest.raises(ConfigError, match="is a file"):
        write_run_directory(replace(job, run_dir=tmp_path / "mine" / "thesis.txt"), {})
    assert (job.run_dir / "resolved.yaml").read_text() == _TEXTS["resolved.yaml"]
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_nodes_of_one_run_write_its_directory_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The other node, whose process has the same number, is half through with each of its files.
    job, real_sync = _local(tmp_path, "true\n"), os.fsync

    def sync(descriptor: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", real_sync)
            write_run_directory(job, _TEXTS)
        real_sync(descriptor)

    monkeypatch.setattr(run_directory, "versions", dict)  # git takes its time
    monkeypatch.setattr(os, "fsync", sync)
    write_run_directory(job, _TEXTS)
    assert (job.run_dir / "job.sh").read_text() == render(job)
    assert not list(job.run_dir.glob("*.tmp*"))


def test_a_file_where_logs_go_is_named(tmp_path: Path) -> None:
    job = _local(tmp_path, "true\n")
    write_run_directory(job, _TEXTS)
    (job.run_dir / "logs").rmdir()
    (job.run_dir / "logs").touch()
    with pytest.raises(ConfigError, match="logs is a file, where logs or profiles go"):
        write_run_directory(job, _TEXTS)


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"cannot write .*/file \(\[Errno 28\] No space left"):
        run_directory.write_text(path, "new")
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"file": "old"}


def test_measured_reads_the_log_file_of_training_first(tmp_path: Path) -> None:
    lines = [
        "Namespace(no_progress_bar=False)",
        '{"train_loss": "1", "train_wps": "9"}',
        '{"num_updates": "10", "wps": "5", "cuda_gb_allocated": "1.5"}',
        '{"num_updates": "15", "wps": null, "cuda_gb_allocated": "none"}',
        '{"num_updates": "20", "wps": "7.5", "cuda_gb_allocated": "2.5"}',
        '{"cut off',
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "logs").mkdir()
    (tmp_path / "plan.json").write_text("[]")
    (tmp_path / "logs" / "17.log").write_text('{"num_updates": "99", "wps": "99"}')
    found = json.loads(write_measured(tmp_path).read_text())
    assert found == {"updates": 20, "words_per_sec": 7.5, "peak_bytes": 2684354560, "planned": None}


@pytest.mark.parametrize(
    ("files", "sentence"),
    [({}, "has neither train.jsonl nor logs"), ({"train.jsonl": "nothing"}, "holds no record of an update")],
)
def test_measured_without_updates_is_one_sentence(
    files: dict[str, str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert main([str(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err
    assert main([]) == 2
    assert not (tmp_path / "measured.json").exists()
