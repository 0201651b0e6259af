"""Starting ranks: plain commands, torchrun, srun and explicit init methods, on CPU and GPU.

Stock infers the launcher from the number of GPUs, which is 0 on a CPU machine. Here the order is: an explicit
--distributed-init-method, then torchrun's environment, then a SLURM step, then processes of our own. Flags
are checked in the parent, before any rank is started.
"""

import logging
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from fairseq.distributed import utils as distributed_utils
from omegaconf import open_dict
from torch.multiprocessing import ProcessExitedException

from fairseq_moe.config import moe_problems
from fairseq_moe.errors import ConfigError, MoEError
from fairseq_moe.stock.seam import seam

__all__ = ["USER_ERROR_EXIT_CODE"]

logger = logging.getLogger(__name__)

USER_ERROR_EXIT_CODE = 2


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
    with _one_sentence_errors():
        on_cpu = _runs_on_cpu(cfg)
        if on_cpu:
            cfg.distributed_training.distributed_backend = "gloo"
        if cfg.distributed_training.distributed_init_method is None:
            distributed_utils.infer_init_method(cfg.distributed_training)
        problems = moe_problems(cfg, world_size=cfg.distributed_training.distributed_world_size)
        if problems:
            raise ConfigError(problems)
        spawns = (
            on_cpu
            and cfg.distributed_training.distributed_init_method is not None
            and not cfg.distributed_training.distributed_no_spawn
        )
        if spawns:
            _spawn_cpu_ranks(cfg, main, kwargs)
        else:
            stock(cfg, main, **kwargs)


def _runs_on_cpu(cfg: Any) -> bool:
    return not cfg.common.tpu and (cfg.common.cpu or not torch.cuda.is_available())


def _spawn_cpu_ranks(cfg: Any, main: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    dist_cfg = cfg.distributed_training
    kwargs["start_rank"] = dist_cfg.distributed_rank
    dist_cfg.distributed_rank = None  # stock's sign for "start_rank + index"
    # More threads than cores make every rank slower by an order of magnitude; torchrun sets the same.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(
        run_rank, args=(main, cfg, kwargs), nprocs=dist_cfg.distributed_world_size, join=True
    )


def run_rank(index: int, main: Callable[..., Any], cfg: Any, kwargs: dict[str, Any]) -> None:
    """Entry point of a spawned rank; importing this module has put the adapter in place."""
    with _one_sentence_errors():
        distributed_utils.distributed_main(index, main, cfg, kwargs)


class _one_sentence_errors:
    """Ends the process with the error's sentence when the error is the user's to mend."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, MoEError):
            _exit_with(error)
        if isinstance(error, ProcessExitedException) and error.exit_code == USER_ERROR_EXIT_CODE:
            sys.exit(USER_ERROR_EXIT_CODE)  # the rank has said why


def _exit_with(error: MoEError) -> NoReturn:
    if torch.distributed.is_initialized():
        rank = torch.distributed.get_rank()
    else:
        rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))
    if rank == 0 or not error.agreed:
        sentences = error.problems if isinstance(error, ConfigError) else [str(error)]
        for sentence in sentences:
            print(f"fairseq_moe: error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(USER_ERROR_EXIT_CODE)


@seam(
    "fairseq.distributed.utils:infer_init_method",
    signature="(cfg, force_distributed)",
    stock_does="divides by the number of GPUs under torchrun, ignores torchrun and srun when no world size is "
    "given, and refuses a world size above the number of GPUs",
    breaks="on a CPU machine torchrun ends in ZeroDivisionError or in independent runs that overwrite each other",
    we_do="take rank and world size from torchrun or SLURM, and pick a free port for ranks of our own on CPU",
    test="tests/e2e/test_launch.py",
)
def infer_init_method(stock: Callable[..., Any], cfg: Any, force_distributed: bool = False) -> None:
    if cfg.distributed_init_method is not None or cfg.tpu or cfg.pipeline_model_parallel:
        stock(cfg, force_distributed)
    elif _from_torchrun(cfg) or _from_slurm(cfg):
        if not torch.cuda.is_available():
            cfg.device_id = 0
        elif cfg.device_id > 0:
            torch.cuda.set_device(cfg.device_id)
    elif torch.cuda.is_available() and cfg.distributed_world_size <= torch.cuda.device_count():
        stock(cfg, force_distributed)
    elif cfg.distributed_world_size > 1:
        port = cfg.distributed_port if cfg.distributed_port > 0 else _free_port()
        cfg.distributed_init_method = f"tcp://127.0.0.1:{port}"
        with open_dict(cfg):
            cfg.distributed_num_procs = cfg.distributed_world_size


def _from_torchrun(cfg: Any) -> bool:
    env = os.environ
    if not all(key in env for key in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")):
        return False
    if int(env["WORLD_SIZE"]) == 1:
        return False
    cfg.distributed_init_method = "env://"
    cfg.distributed_world_size = int(env["WORLD_SIZE"])
    cfg.distributed_rank = int(env["RANK"])
    cfg.device_id = int(env.get("LOCAL_RANK", 0))
    cfg.distributed_no_spawn = True
    return True


def _from_slurm(cfg: Any) -> bool:
    """One rank per task of an srun step; True if this process is one of several tasks."""
    env = os.environ
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST"))
    num_tasks = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
    if nodes is None or num_tasks == 1 or "SLURM_PROCID" not in env:
        return False
    num_nodes = int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1")))
    num_gpus = torch.cuda.device_count()
    if num_tasks == num_nodes and num_gpus > 1:
        return _one_task_per_gpu_node(cfg, nodes, num_nodes, num_gpus)
    given = cfg.distributed_world_size
    if given not in (num_tasks, max(1, num_gpus)):
        raise ConfigError(
            [
                f"--distributed-world-size is {given} but this SLURM step has {num_tasks} tasks; leave the flag out "
                "or start as many tasks as ranks."
            ]
        )
    cfg.distributed_init_method = _slurm_address(cfg, nodes)
    cfg.distributed_world_size = num_tasks
    cfg.distributed_rank = int(env["SLURM_PROCID"])
    cfg.device_id = int(env.get("SLURM_LOCALID", "0"))
    cfg.distributed_no_spawn = True
    return True


def _one_task_per_gpu_node(cfg: Any, nodes: str, num_nodes: int, num_gpus: int) -> bool:
    """Each task spawns a rank per GPU of its node, as stock does."""
    cfg.distributed_init_method = _slurm_address(cfg, nodes)
    cfg.distributed_rank = int(os.environ["SLURM_NODEID"]) * num_gpus
    cfg.distributed_world_size = num_nodes * num_gpus
    return True


def _slurm_address(cfg: Any, nodes: str) -> str:
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            [
                f"cannot expand the SLURM node list {nodes!r} with scontrol ({error}); pass "
                "--distributed-init-method tcp://HOST:PORT, --distributed-world-size and --distributed-rank instead."
            ]
        ) from error
    port = cfg.distributed_port
    if port <= 0:
        # Every task must arrive at the same number without talking to the others.
        port = random.Random(os.environ.get("SLURM_JOB_ID", nodes)).randint(10000, 60000)
    return f"tcp://{listed.stdout.split()[0]}:{port}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
