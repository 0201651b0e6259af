"""Job scripts with real training in them: two CPU ranks under a stub of SLURM; torchrun on two nodes of one machine."""

import contextlib
import json
import os
import re
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fairseq_moe.launch.job import Cluster, Job
from fairseq_moe.launch.measured import write_measured
from fairseq_moe.launch.render import render
from fairseq_moe.launch.submit import submit
from tests.e2e.commands import train, train_argv
from tests.e2e.processes import console_script, start_process
from tests.helpers.jobs import plain_job
from tests.helpers.ranks import REPOSITORY, CommandResult
from tests.helpers.scheduler import Scheduler, Start, write_program

_FLAGS = ("--disable-validation", "--no-epoch-checkpoints", "--max-update", "8")
# Rank 0 waits in its fifth update, so that TERM comes while four are done, on a busy machine too.
_PAUSE = {"FAIRSEQ_MOE_FAULT": "train.forward@0@5=sleep:8"}
_LOSS = re.compile(r'"loss": "([\d.]+)".*"num_updates": "(\d+)"')


def _losses(text: str) -> dict[int, str]:
    return {int(update): loss for loss, update in _LOSS.findall(text)}


def _job(data: Path, folder: Path) -> Job:
    run_dir = folder / "a run"
    log = ("--log-file", run_dir / "train.jsonl")
    argv = map(str, train_argv(data, run_dir / "checkpoints", *_FLAGS, *log))
    job = plain_job("sbatch", "none", run_dir, (str(console_script("fairseq-train")), *argv))
    return replace(job, requeue=True, max_restarts=1, cluster=Cluster(gpus_per_node=0))


def _submitted(job: Job, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Scheduler, bytes]:
    stubs = folder / "slurm"
    path = f"{stubs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    scheduler = Scheduler(stubs, {"PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"})
    with monkeypatch.context() as patch:
        for name, value in scheduler.environ.items():
            patch.setenv(name, value)
        assert submit(job) == 0
    write_program(
        stubs / "python", 'echo "python $*"\n'
    )  # an interpreter takes seconds, and what it does is tested elsewhere
    (script,) = scheduler.submitted
    assert script == render(job).encode()
    return scheduler, script


def _stopped(scheduler: Scheduler, script: bytes, ranks: int) -> Start:
    return scheduler.start(script, ranks=ranks, term_when=lambda text: 4 in _losses(text), environ=_PAUSE)


@pytest.mark.slow
@pytest.mark.timeout(600)  # each start is two new interpreters
def test_term_saves_and_the_job_goes_on_when_it_is_queued_again(
    text_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: CommandResult = train(text_data, tmp_path / "whole", *_FLAGS, world_size=2)
    job = _job(text_data, tmp_path)
    scheduler, script = _submitted(job, tmp_path, monkeypatch)

    first = _stopped(scheduler, script, 2)
    assert (first.exit_code, first.requeued) == (0, True), first.output[-3000:]
    assert "training stops after update 5: SIGTERM" in first.output

    second = scheduler.start(script, ranks=2, restarts=1)
    assert (second.exit_code, second.requeued) == (0, False), second.output[-3000:]
    before, after = _losses(first.output), _losses(second.output)
    assert (list(before), list(after)) == ([1, 2, 3, 4, 5], [6, 7, 8])
    assert before | after == _losses(whole.outputs[0])
    assert f"python -m fairseq_moe.launch.measured {job.run_dir}\n" in second.output
    assert json.loads(write_measured(job.run_dir).read_text())["updates"] == 8


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_after_a_failed_save_the_job_has_failed_and_is_not_queued_again(
    text_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = replace(_job(text_data, tmp_path), ranks_per_node=1)
    scheduler, script = _submitted(job, tmp_path, monkeypatch)
    (job.run_dir / "checkpoints").mkdir()
    (job.run_dir / "checkpoints" / "shards").touch()  # where a directory should be
    start = _stopped(scheduler, script, 1)
    assert "the save at update 5 failed" in start.output
    assert "no checkpoint was written after it; the job has failed" in start.output
    assert (start.exit_code, start.requeued) == (1, False)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_torchrun_joins_nodes_by_number_and_address(tmp_path: Path) -> None:
    show = write_program(tmp_path / "show", 'echo "rank $RANK of $WORLD_SIZE is $LOCAL_RANK here: $*"\n')
    job = plain_job("interactive", "none", tmp_path / "run", (str(show), "a b"))
    job = replace(job, num_nodes=2, ranks_per_node=1)
    script = tmp_path / "job.sh"
    script.write_text(render(job))
    at = ["env", f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}"]
    refused = start_process(*at, "bash", script, cwd=tmp_path)
    assert "not set: NODE_RANK MASTER_ADDR MASTER_PORT." in refused.communicate(timeout=60)[0]
    assert refused.returncode == 2
    at += ["MASTER_ADDR=127.0.0.1", f"MASTER_PORT={_free_port()}"]
    nodes = [start_process(*at, f"NODE_RANK={node}", "bash", script, cwd=tmp_path) for node in range(2)]
    try:
        outputs = [node.communicate(timeout=140)[0] for node in nodes]
    finally:
        for node in nodes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
    assert [node.returncode for node in nodes] == [0, 0], outputs
    for node, output in enumerate(outputs):
        assert f"rank {node} of 2 is 0 here: a b\n" in output


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
