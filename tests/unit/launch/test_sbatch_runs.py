"""The job script of SLURM under a stub scheduler, with a program that stands in for training."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from fairseq_moe.launch.job import Job
from fairseq_moe.launch.render import render
from tests.helpers.jobs import plain_job
from tests.helpers.scheduler import Scheduler, Start, write_program

# Trains until TERM, or not at all; then saves, if it may, and ends as it is told.
_TRAINER = """\
save() { echo "$RANDOM" > "$1.new" && mv "$1.new" "$1"; }
trap '[[ -z "${SAVES:-}" ]] || save "$2"; exit "${CODE:-0}"' TERM
echo started
if [[ "${WAITS:-}" ]]; then
  for _ in {1..400}; do sleep 0.05; done
fi
save "$2"
exit "${CODE:-0}"
"""


def _job(folder: Path, kind: str = "none", **changes: object) -> Job:
    trainer = write_program(folder / "trainer", _TRAINER)
    write_program(folder / "python", 'echo "python $*"\n')
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "run" / "checkpoints" / "checkpoint_last.pt").write_text("of an earlier start")
    command = (str(trainer), "--file", str(folder / "run/checkpoints/checkpoint_last.pt"))
    job = plain_job("sbatch", kind, folder / "run", command)
    return replace(job, **{"requeue": True, "ranks_per_node": 1, **changes})  # type: ignore[arg-type]


def _start(
    job: Job, folder: Path, environ: Mapping[str, str], *, text: str | None = None, restarts: int = 0
) -> Start:
    scheduler = Scheduler(folder / "slurm", {"PATH": f"{folder / 'slurm'}:{folder}:/usr/bin:/bin", **environ})
    return scheduler.start(
        (text or render(job)).encode(), ranks=1, restarts=restarts,
        term_when=(lambda output: "started" in output) if "WAITS" in environ else None,
    )  # fmt: skip


_STOPPED = {"WAITS": "1", "SAVES": "1"}


@pytest.mark.parametrize(
    ("environ", "code", "requeued", "sentence"),
    [
        (_STOPPED, 0, True, "saved, and queued again"),
        (_STOPPED | {"JOB_STATE": "CANCELLED"}, 0, False, ""),
        (_STOPPED | {"CODE": "3"}, 3, False, ""),
        ({"WAITS": "1"}, 1, False, "no checkpoint was written after it; the job has failed"),
        ({}, 0, False, ""),  # trained to the end
        ({"CODE": "2"}, 2, False, ""),
    ],
    ids=["saved", "cancelled", "failed", "no save", "done", "wrong flags"],
)
def test_a_job_is_queued_again_after_a_good_save_alone(
    environ: dict[str, str], code: int, requeued: bool, sentence: str, tmp_path: Path
) -> None:
    start = _start(_job(tmp_path), tmp_path, environ)
    assert (start.exit_code, start.requeued) == (code, requeued), start.output
    assert sentence in start.output
    measured = f"python -m fairseq_moe.launch.measured {tmp_path}/run"
    assert (measured in start.output) is (code == 0 and not requeued)


def test_a_signal_to_srun_would_kill_the_ranks(tmp_path: Path) -> None:
    job = _job(tmp_path)
    text = render(job)
    mutated = text.replace('scancel --signal=TERM "$SLURM_JOB_ID"', 'kill -TERM "$ranks"')
    assert mutated != text
    start = _start(job, tmp_path, _STOPPED, text=mutated)
    assert "forcing job termination" in start.output
    assert (start.exit_code, start.requeued) == (128 + 9, False)


@pytest.mark.parametrize(("restarts", "requeued"), [(0, True), (1, True), (2, False), (5, False)])
def test_restarts_have_a_cap(restarts: int, requeued: bool, tmp_path: Path) -> None:
    start = _start(_job(tmp_path, max_restarts=2), tmp_path, _STOPPED, restarts=restarts)
    assert (start.exit_code, start.requeued) == (0, requeued)
    assert (f"started again {restarts} times already, and 2 is the most" in start.output) is not requeued


def test_a_job_that_may_not_be_queued_again_saves_all_the_same(tmp_path: Path) -> None:
    start = _start(_job(tmp_path, requeue=False), tmp_path, _STOPPED)
    assert (start.exit_code, start.requeued) == (0, False)
    assert (tmp_path / "run/checkpoints/checkpoint_last.pt").read_text() != "of an earlier start"


def test_a_checkpoint_inside_a_container_is_looked_for_outside(tmp_path: Path) -> None:
    job = _job(tmp_path, "pyxis")
    mounts = (("/data", "/data"), (str(tmp_path), "/inside"), (str(tmp_path / "elsewhere"), "/inside/other"))
    command = (*job.command, "--save-dir", "/inside/run/checkpoints")
    job = replace(job, command=command, container=replace(job.container, mounts=mounts))
    assert _start(job, tmp_path, _STOPPED).requeued


def test_ranks_in_a_container_know_one_another_without_scontrol(tmp_path: Path) -> None:
    show = write_program(
        tmp_path / "show", 'echo "$RANK/$WORLD_SIZE at $LOCAL_RANK, $MASTER_ADDR:$MASTER_PORT"\n'
    )
    job = replace(_job(tmp_path, "pyxis", ranks_per_node=2), command=(str(show),))
    scheduler = Scheduler(tmp_path / "slurm", {"PATH": f"{tmp_path / 'slurm'}:{tmp_path}:/usr/bin:/bin"})
    output = scheduler.start(render(job).encode(), ranks=2).output
    assert {"0/2 at 0, 127.0.0.1:10017", "1/2 at 1, 127.0.0.1:10017"} <= set(output.splitlines())
    given = replace(job, command=(str(show), "--distributed-port", "4321"))
    assert "0/2 at 0, 127.0.0.1:4321\n" in scheduler.start(render(given).encode(), ranks=2).output


@pytest.mark.parametrize("found", [True, False])
def test_nsys_wraps_the_ranks_asked_for_or_torch_is_asked_by_all(found: bool, tmp_path: Path) -> None:
    show = write_program(tmp_path / "show", 'echo "rank $SLURM_PROCID runs $*"\n')
    job = _job(tmp_path, ranks_per_node=2)
    job = replace(job, command=(str(show), "word"), profile=replace(job.profile, profiler="nsys", ranks=(1,)))
    scheduler = Scheduler(tmp_path / "slurm", {"PATH": f"{tmp_path / 'slurm'}:{tmp_path}:/usr/bin:/bin"})
    if found:
        write_program(tmp_path / "nsys", 'echo "nsys $*"\n')
    lines = scheduler.start(render(job).encode(), ranks=2).output.splitlines()
    if found:
        wrapped = "--capture-range=cudaProfilerApi --capture-range-end=stop --force-overwrite=true"
        nsys = f"nsys profile -t cuda,nvtx {wrapped} -o {tmp_path}/run/profile/rank-1 {show} word"
        assert {"rank 0 runs word", nsys} <= set(lines)
    else:
        assert {"rank 0 runs word --use-pytorch-profiler", "rank 1 runs word --use-pytorch-profiler"} <= set(
            lines
        )
        assert [line for line in lines if line.startswith("profile:")] == [
            "profile: nsys is not found; torch profiles instead"
        ]
