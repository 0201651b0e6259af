"""Start a command in other ways, as entry points for ``run_cli``: its first argument is the command's module.

``run_cli`` starts ranks with torchrun's environment; some functions here trade it for another launcher's.
"""

import importlib
import importlib.util
import logging
import os
import random
import runpy
import sys
import time
from typing import Any

import numpy as np
import torch

__all__ = [
    "after_debug_logging",
    "as_main_module",
    "as_script",
    "by_init_method",
    "by_srun",
    "late_rank_1",
    "then_draw",
]


def as_main_module() -> None:
    """Run the command as ``python -m MODULE`` does."""
    runpy.run_module(_pop_module(), run_name="__main__", alter_sys=True)


def as_script() -> None:
    """Run the command as ``python /path/of/module.py`` does."""
    found = importlib.util.find_spec(_pop_module())
    assert found is not None
    assert found.origin is not None
    runpy.run_path(found.origin, run_name="__main__")


def by_init_method() -> None:
    """Start every rank on its own, with an explicit address and rank."""
    env = _pop_torchrun()
    sys.argv += ["--distributed-init-method", f"tcp://127.0.0.1:{env['MASTER_PORT']}"]
    sys.argv += ["--distributed-world-size", env["WORLD_SIZE"], "--distributed-rank", env["RANK"]]
    sys.argv += ["--distributed-no-spawn"]
    _call()


def by_srun() -> None:
    """Start the command as a SLURM step of one task per rank on one node; the variables are those that srun sets."""
    env = _pop_torchrun()
    os.environ.update(
        SLURM_JOB_ID=env["MASTER_PORT"],  # stock and we derive the port from it
        SLURM_STEP_ID="0",
        SLURM_STEP_NODELIST="node[1]",
        SLURM_STEP_NUM_NODES="1",
        SLURM_STEP_NUM_TASKS=env["WORLD_SIZE"],
        SLURM_PROCID=env["RANK"],
        SLURM_LOCALID=env["RANK"],
        SLURM_NODEID="0",
    )
    _call()


def late_rank_1() -> None:
    """Let rank 1 still make process groups, by way of rank 0's store, a second after rank 0 has its own."""
    import torch.distributed as dist

    from fairseq_moe.distributed import mesh

    make_groups = mesh._make_groups

    def make_slowly(*args: Any) -> Any:
        groups = make_groups(*args)
        if dist.get_rank() == 1:
            time.sleep(1)
            dist.new_group([1], use_local_synchronization=True)
        return groups

    mesh._make_groups = make_slowly
    _call()


def after_debug_logging() -> None:
    """The command after ``logging.basicConfig(level=DEBUG)``, which an import inside fairseq leaves behind."""
    logging.basicConfig(level=logging.DEBUG)
    _call()


def then_draw() -> None:
    """Run the command in this process; then one number of each random generator shows what it has consumed."""
    random.seed(0)  # fairseq seeds the other two
    if "RANK" in os.environ:
        by_init_method()
    else:
        _call()
    print("then drawn:", torch.rand(()).item(), np.random.rand(), random.random())


def _call() -> None:
    importlib.import_module(_pop_module()).cli_main()


def _pop_module() -> str:
    module = sys.argv.pop(1)
    sys.argv[0] = module
    return module


def _pop_torchrun() -> dict[str, str]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: os.environ.pop(name) for name in names}
