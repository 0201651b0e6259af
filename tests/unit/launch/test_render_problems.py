"""A job that cannot be written down is refused in sentences, all at once; what can be is not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fairseq_moe.errors import ConfigError
from fairseq_moe.launch.job import Cluster, Container, Job, Profile
from fairseq_moe.launch.render import render
from tests.helpers.jobs import plain_job

_DOCKER = Container(kind="docker", image="i")
_PYXIS = Container(kind="pyxis", image="i")

# What is changed in a job of SLURM, and a part of the one sentence that says what is wrong.
_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"command": ()}, "has no command"),
    ({"command": ("a", "b\0c")}, "holds a zero byte"),
    ({"name": "a/b"}, "the run's name is 'a/b'"),
    ({"name": "a\nb"}, r"the run's name is 'a\nb'"),
    ({"name": ".."}, "the run's name is '..'"),
    ({"name": "\u00e9" * 128}, "the run's name has 256 bytes, expected at most 255"),
    ({"command": ("a", "b\udcff")}, "is not UTF-8"),
    ({"run_dir": Path("runs/x")}, "expected a path from the root"),
    ({"run_dir": Path("/runs/a\\b")}, "holds a backslash"),
    ({"env": {"A-B": "1"}}, "env has 'A-B'"),
    ({"env": {"WANDB_API_KEY": "1"}}, "env has a value of WANDB_API_KEY, which is a secret"),
    ({"secrets": ("A B",)}, "secrets has 'A B'"),
    ({"cluster": Cluster(account="a\nb")}, "control character"),
    ({"cluster": Cluster(sbatch_args=("--x\n--y",))}, "control character"),
    ({"num_nodes": 0}, "the number of nodes is 0"),
    ({"ranks_per_node": 0}, "the number of ranks per node is 0"),
    ({"chain": 0}, "the number of jobs is 0"),
    ({"ranks_per_node": 9}, "9 ranks per node are asked for, but the cluster's nodes have 8 GPUs"),
    ({"num_nodes": 3, "cluster": Cluster(segment=2)}, "the segment is 2 nodes, expected a divisor of the 3"),
    ({"container": _DOCKER}, "the container is docker, which mode sbatch cannot start"),
    ({"container": Container(kind="apptainer")}, "no image is named"),
    ({"container": Container(kind="pyxis")}, "no image is named"),
    ({"container": replace(_PYXIS, mounts=(("/a:b", "/c"),))}, "comma or colon"),
    ({"container": replace(_PYXIS, mounts=(("/a", "c,d"),))}, "comma or colon"),
    ({"container": replace(_PYXIS, mounts=(("a", "/c"),))}, "expected a path from the root"),
    ({"lead_sec": 0}, "lead_sec is 0"),
    ({"lead_sec": 65536}, "lead_sec is 65536"),
    ({"max_restarts": -1}, "max_restarts is -1"),
    ({"time_limit": "20"}, "the time limit is '20', expected HH:MM:SS"),
    ({"time_limit": "00:10:00"}, "over when the save should begin, 600 s before"),
    ({"profile": Profile(profiler="torch", first_step=0)}, "updates 0 to 11"),
    ({"profile": Profile(profiler="torch", first_step=12)}, "updates 12 to 11"),
    ({"profile": Profile(profiler="nsys", ranks=())}, "of no rank"),
    ({"profile": Profile(profiler="nsys", ranks=(2,))}, "rank 2 is to be profiled, and ranks are 0 to 1"),
    ({"mode": "local", "num_nodes": 2}, "mode local runs on this machine alone"),
    ({"mode": "local", "requeue": True}, "mode local has no queue"),
    ({"mode": "interactive", "chain": 2}, "mode interactive has no queue"),
    ({"mode": "interactive", "container": _PYXIS}, "the container is pyxis, which mode interactive cannot"),
]


def _job(**changes: Any) -> Job:
    return replace(plain_job("sbatch", "none", Path("/runs/x")), **changes)


@pytest.mark.parametrize(("changes", "sentence"), _FAULTS, ids=[sentence for _, sentence in _FAULTS])
def test_a_fault_is_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        render(_job(**changes))
    assert len(raised.value.problems) == 1
    assert sentence in str(raised.value)


def test_all_faults_are_said_at_once() -> None:
    changes = {
        "name": "",
        "command": (),
        "time_limit": "x",
        "num_nodes": 0,
        "container": Container(kind="docker"),
    }
    with pytest.raises(ConfigError) as raised:
        render(_job(**changes))
    assert len(raised.value.problems) == 6  # docker in sbatch, and without an image


@pytest.mark.parametrize(
    "changes",
    [
        {"time_limit": "0:10:01"},
        {"time_limit": "1-00:00:00", "lead_sec": 65535},
        {"container": Container(kind="pyxis", name="kept")},
        {"mode": "local", "ranks_per_node": 9},
        {"mode": "local", "cluster": Cluster(segment=2)},
        {"cluster": Cluster(gpus_per_node=0), "ranks_per_node": 9},
        {"max_restarts": 0},
    ],
    ids=str,
)
def test_what_can_be_is_written_down(changes: dict[str, Any]) -> None:
    assert render(_job(**changes)).startswith("#!/bin/bash\n")
