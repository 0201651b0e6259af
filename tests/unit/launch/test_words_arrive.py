"""Whatever words a command and its variables hold, the program gets exactly these, in every mode and container."""

import random
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fairseq_moe.launch.job import Cluster
from fairseq_moe.launch.render import command_text, flag_value, render
from tests.helpers.jobs import MODES_AND_CONTAINERS, plain_job
from tests.helpers.scheduler import Scheduler, write_program

_SHOW = """\
printf '%s\\0' "$NOTE" "$@" > "$SHOWN"
"""
# A launcher leaves out its own flags, as far as it knows them, and becomes the rest.
_LAUNCHERS = {
    "torchrun": 'while [[ "$1" == --* ]]; do shift; done\nexec "$@"\n',
    "apptainer": """\
shift
while [[ "$1" == --* ]]; do case "$1" in --bind | --pwd) shift 2 ;; *) shift ;; esac; done
shift
exec "$@"
""",
    "docker": """\
shift
while [[ "$1" == --* ]]; do
  case "$1" in --volume | --workdir | --env | --user) shift 2 ;; *) shift ;; esac
done
shift
exec "$@"
""",
}
_CHARACTERS = [*map(chr, range(1, 128)), *"\xe9\u4e2d\U0001f600", *"'\"\\$`!#&;|<>(){}[]*?~ \n\t" * 3]
_HOSTILE = [
    "",
    " ",
    "'",
    "''",
    '"',
    "\\",
    "$HOME",
    "$(id)",
    "`id`",
    "a b",
    "-",
    "--",
    "--a b",
    "a\nb",
    "\n",
    "!!",
    "{}",
]


def _words(seed: int) -> list[str]:
    """Make random words, and those that a quoting by hand would get wrong."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(_CHARACTERS, k=rng.randint(1, 12))) for _ in range(200)]
    words = [*words, *_HOSTILE]
    rng.shuffle(words)
    return words


@pytest.mark.parametrize(("mode", "kind"), MODES_AND_CONTAINERS)
def test_words_arrive_unchanged(mode: str, kind: str, tmp_path: Path) -> None:
    seed = MODES_AND_CONTAINERS.index((mode, kind))
    for name, text in _LAUNCHERS.items():
        write_program(tmp_path / name, text)
    write_program(tmp_path / "python", "true\n")
    show = write_program(tmp_path / 'it\'s a "program"', _SHOW)
    words = _words(seed)
    note = "".join(words)
    job = plain_job(mode, kind, tmp_path / "it's $a run", (str(show), *words))
    # One rank, and a profile where there are GPUs, so that all that can stand in front of the command does.
    job = replace(job, ranks_per_node=1, env={"NOTE": note}, profile=replace(job.profile, profiler="nsys"))
    scheduler = Scheduler(tmp_path / "slurm", {"PATH": f"{tmp_path / 'slurm'}:{tmp_path}:/usr/bin:/bin"})
    start = scheduler.start(
        render(job).encode(), ranks=1, environ={"SHOWN": str(tmp_path / "shown"), "RANK": "0", "USER": "me"}
    )
    assert start.exit_code == 0, start.output
    shown = (tmp_path / "shown").read_bytes().decode().split("\0")[:-1]
    assert shown == [note, *words, "--use-pytorch-profiler"]


def test_the_command_alone_can_be_typed(tmp_path: Path) -> None:
    words = _words(99)
    show = write_program(tmp_path / "show", _SHOW)
    subprocess.run(
        ["bash", "-c", command_text([str(show), *words])],
        env={"NOTE": "", "SHOWN": str(tmp_path / "shown"), "PATH": "/usr/bin:/bin"}, check=True, timeout=60,
    )  # fmt: skip
    assert (tmp_path / "shown").read_bytes().decode().split("\0")[1:-1] == words


def _directives(text: str) -> list[str]:
    """Read #SBATCH lines as sbatch does: quotes of both kinds, and backslashes (slurm's ``sbatch.c``)."""
    import shlex

    lines = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert lines and text.startswith("#!/bin/bash\n" + "".join(f"#SBATCH {line}\n" for line in lines))
    return [word for line in lines for word in shlex.split(line)]


def test_directives_are_read_as_they_were_meant() -> None:
    args = ("--qos=a b", '--comment=it\'s "quoted" #1 $HOME \\', "--mail-user=x")
    cluster = Cluster(account="a team", partition="p'q", sbatch_args=args, segment=1)
    job = replace(plain_job("sbatch", "none", Path("/runs/100% it's")), name="a 'b' #c", cluster=cluster)
    words = _directives(render(replace(job, num_nodes=3, time_limit="0:20:00", lead_sec=90)))
    expected = {
        "--job-name=a 'b' #c",
        "--account=a team",
        "--partition=p'q",
        "--nodes=3",
        "--ntasks-per-node=2",
    }
    expected |= {
        "--exclusive",
        "--segment=1",
        "--time=0:20:00",
        "--signal=B:TERM@90",
        "--gpus-per-node=2",
        *args,
    }
    expected |= {"--output=/runs/100%% it's/logs/%j.log", "--open-mode=append", "--no-requeue"}
    assert set(words) == expected


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["a", "--save-dir", "x"], "x"),
        (["a", "--save-dir=x", "--save-dir", "y"], "y"),
        (["a", "--save-dir", "x", "--save-dir=y=z"], "y=z"),
        (["a", "--save-directory", "x"], None),
    ],
)
def test_the_last_value_of_a_flag_counts(words: Sequence[str], value: str | None) -> None:
    assert flag_value(words, "--save-dir") == value
