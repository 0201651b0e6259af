"""Starting ranks: plain commands, torchrun, srun and explicit init methods, on CPU and GPU.

Stock infers the launcher from the number of GPUs, which is 0 on a CPU machine. Here the order is: an explicit
--distributed-init-method, then torchrun's environment, then a SLURM step, then processes of our own. Flags
are checked in the parent, before any rank is started.
"""

import os
import random
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from fairseq.distributed import utils as distributed_utils
from omegaconf import open_dict
from torch.multiprocessing.spawn import spawn

from fairseq_moe.criterions.best_metric import best_metric_problems
from fairseq_moe.errors import ConfigError
from fairseq_moe.flags.moe_checks import moe_problems
from fairseq_moe.stock.run import end_of_run
from fairseq_moe.stock.seam import seam
from fairseq_moe.stock.start.ending import failures_told, has_experts, one_sentence_errors
from fairseq_moe.stock.start.given import given_names, restore_given
from fairseq_moe.stock.start.log_format import use_stock_log_format
from fairseq_moe.stock.start.other_models import other_model_problems
from fairseq_moe.stock.start.spawned import wait_for
from fairseq_moe.stock.start.task_steps import task_step_problems

__all__ = ["run_rank"]


@seam(
    "fairseq.distributed.utils:call_main",
    signature="(cfg, main, **kwargs)",
    stock_does="spawns min(number of GPUs, world size) processes, that is none on a CPU machine",
    breaks="a CPU run with a world size exits with code 0 and has trained nothing; wrong flags fail rank by "
    "rank, with stack traces",
    we_do="check all flags first, spawn one process per rank on CPU, and end user errors with one sentence",
    test="tests/e2e/test_launch.py",
)
def call_main(stock: Callable[..., Any], cfg: Any, main: Callable[..., Any], **kwargs: Any) -> None:
    use_stock_log_format()
    with one_sentence_errors():
        dist_cfg = cfg.distributed_training
        on_cpu = not cfg.common.tpu and (cfg.common.cpu or not torch.cuda.is_available())
        if on_cpu:
            dist_cfg.distributed_backend = "gloo"
        if dist_cfg.distributed_init_method is None and not dist_cfg.pipeline_model_parallel:
            _infer(dist_cfg, on_cpu=on_cpu, stock=distributed_utils.infer_init_method.__wrapped__)
        problems = other_model_problems(cfg) or [
            *moe_problems(cfg, world_size=dist_cfg.distributed_world_size),
            *best_metric_problems(cfg),
            *task_step_problems(cfg),
        ]
        if problems:
            raise ConfigError(problems)
        if dist_cfg.distributed_init_method is None or dist_cfg.distributed_no_spawn:
            with failures_told():
                stock(cfg, main, **kwargs)
                end_of_run()
        else:
            _spawn_ranks(cfg, main, kwargs, on_cpu=on_cpu)


def _spawn_ranks(cfg: Any, main: Callable[..., Any], kwargs: dict[str, Any], *, on_cpu: bool) -> None:
    dist_cfg = cfg.distributed_training
    kwargs["start_rank"] = dist_cfg.distributed_rank
    dist_cfg.distributed_rank = None  # stock's sign for "start_rank + index"
    num_processes = dist_cfg.distributed_world_size
    if not on_cpu:
        num_processes = min(torch.cuda.device_count(), num_processes)
    elif kwargs["start_rank"] > 0:
        raise ConfigError(
            [
                f"--distributed-rank is {kwargs['start_rank']}, but on CPU one command starts all ranks; add "
                "--distributed-no-spawn to start this rank alone."
            ]
        )
    else:
        # More threads than cores make every rank slower by an order of magnitude; torchrun sets the same.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    args = (main, cfg, kwargs, given_names())
    ranks = spawn(run_rank, args=args, nprocs=num_processes, join=False)
    if has_experts(cfg):
        wait_for(ranks)
    else:
        while not ranks.join():
            pass


def run_rank(
    index: int, main: Callable[..., Any], cfg: Any, kwargs: dict[str, Any], given: frozenset[str] | None
) -> None:
    """Run a command in a spawned rank; importing this module has put the adapter in place."""
    use_stock_log_format()
    restore_given(given)
    try:
        with one_sentence_errors(), failures_told():
            distributed_utils.distributed_main(index, main, cfg, kwargs)
            end_of_run()
    except Exception:
        if not has_experts(cfg):
            raise  # torch hands it to the parent, which waits with ranks.join()
        traceback.print_exc()
        sys.exit(1)


@seam(
    "fairseq.distributed.utils:infer_init_method",
    signature="(cfg, force_distributed)",
    stock_does="divides by the number of GPUs under torchrun, ignores torchrun and srun when no world size "
    "is given, and refuses a world size above the number of GPUs",
    breaks="on a CPU machine torchrun ends in ZeroDivisionError or in independent runs that overwrite each "
    "other",
    we_do="take rank and world size from torchrun or SLURM, and pick a free port for ranks of our own on CPU",
    test="tests/e2e/test_launch.py",
)
def infer_init_method(stock: Callable[..., Any], cfg: Any, force_distributed: bool = False) -> None:
    _infer(cfg, on_cpu=not torch.cuda.is_available(), stock=stock, force_distributed=force_distributed)


def _infer(cfg: Any, *, on_cpu: bool, stock: Callable[..., Any], force_distributed: bool = False) -> None:
    if cfg.distributed_init_method is not None or cfg.tpu or cfg.pipeline_model_parallel:
        stock(cfg, force_distributed)
    elif _from_torchrun(cfg) or _from_slurm(cfg):
        if on_cpu:
            cfg.device_id = 0
        elif cfg.device_id > 0:
            torch.cuda.set_device(cfg.device_id)
    elif not on_cpu:
        stock(cfg, force_distributed)
    elif cfg.distributed_world_size > 1:
        port = cfg.distributed_port if cfg.distributed_port > 0 else _free_port()
        cfg.distributed_init_method = f"tcp://127.0.0.1:{port}"
        with open_dict(cfg):
            cfg.distributed_num_procs = cfg.distributed_world_size


def _from_torchrun(cfg: Any) -> bool:
    """Take rank and world size from torchrun's environment; True if this process is one of several."""
    env = os.environ
    if not all(key in env for key in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")):
        return False
    world_size = int(env["WORLD_SIZE"])
    if world_size == 1:
        return False
    _check_world_size(cfg, world_size, found=f"torchrun has started {world_size} processes")
    cfg.distributed_init_method = "env://"
    cfg.distributed_world_size = world_size
    cfg.distributed_rank = int(env["RANK"])
    cfg.device_id = int(env.get("LOCAL_RANK", 0))
    cfg.distributed_no_spawn = True
    return True


def _check_world_size(cfg: Any, started: int, *, found: str) -> None:
    given = cfg.distributed_world_size
    if given not in (started, max(1, torch.cuda.device_count())):  # the latter is the flag's default
        raise ConfigError(
            [
                f"--distributed-world-size is {given} but {found}; leave the flag out or start as many "
                "processes as ranks."
            ]
        )


def _from_slurm(cfg: Any) -> bool:
    """Take rank and world size from an srun step; True if this process is one of several tasks."""
    env = os.environ
    num_tasks = _tasks_of_slurm_step()
    if num_tasks == 1:
        return False
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", ""))
    num_nodes = int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1")))
    num_gpus = torch.cuda.device_count()
    if num_tasks == num_nodes and num_gpus > 1:
        return _one_task_per_gpu_node(cfg, nodes, num_nodes, num_gpus)
    _check_world_size(cfg, num_tasks, found=f"this SLURM step has {num_tasks} tasks")
    cfg.distributed_init_method = _slurm_address(cfg, nodes)
    cfg.distributed_world_size = num_tasks
    cfg.distributed_rank = int(env["SLURM_PROCID"])
    cfg.device_id = int(env.get("SLURM_LOCALID", "0"))
    cfg.distributed_no_spawn = True
    return True


def _tasks_of_slurm_step() -> int:
    """Count the tasks started together with this process; 1 for a command that a batch script runs without srun.

    srun describes its step. Where only the job is described (launchers that set stock's variables), a process
    of a batch script is told by ENVIRONMENT=BATCH: it has a SLURM_PROCID too, but nobody else was started.
    """
    env = os.environ
    if "SLURM_STEP_NUM_TASKS" in env:
        return int(env["SLURM_STEP_NUM_TASKS"])
    if "SLURM_PROCID" not in env or env.get("ENVIRONMENT") == "BATCH":
        return 1
    per_node, num_nodes = env.get("SLURM_NTASKS_PER_NODE", "1"), env.get("SLURM_NNODES", "1")
    return int(env.get("SLURM_NTASKS", int(per_node) * int(num_nodes)))


def _one_task_per_gpu_node(cfg: Any, nodes: str, num_nodes: int, num_gpus: int) -> bool:
    """Let each task spawn a rank per GPU of its node, as stock does."""
    cfg.distributed_init_method = _slurm_address(cfg, nodes)
    cfg.distributed_rank = int(os.environ["SLURM_NODEID"]) * num_gpus
    cfg.distributed_world_size = num_nodes * num_gpus
    return True


def _slurm_address(cfg: Any, nodes: str) -> str:
    try:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            [
                f"cannot expand the SLURM node list {nodes!r} with scontrol ({error}); pass "
                "--distributed-init-method tcp://HOST:PORT, --distributed-world-size and --distributed-rank "
                "instead."
            ]
        ) from error
    port = cfg.distributed_port
    if port <= 0:
        # Every task must arrive at the same number without talking to the others; steps of one job differ.
        step = f"{os.environ.get('SLURM_JOB_ID')}.{os.environ.get('SLURM_STEP_ID')}"
        port = random.Random(step).randint(10000, 60000)
    return f"tcp://{listed.stdout.split()[0]}:{port}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
