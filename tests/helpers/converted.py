"""Build the Trainer of a model that ``from_hf`` wrote, as fairseq-train does with its flags.txt. For forked ranks."""

from argparse import Namespace
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from shlex import split
from typing import Any

import torch

__all__ = ["build_converted", "converted_config", "flags_of"]

_FLAGS = (
    "--task language_modeling --tokens-per-sample 16 --batch-size 2 --criterion moe_cross_entropy --optimizer adam "
    "--lr 0.001 --dropout 0 --seed 3 --cpu --distributed-backend gloo --clip-norm 0"
)


def flags_of(model: Path) -> list[str]:
    """Read the flags that build the model of a directory of ``from_hf``."""
    lines = (model / "flags.txt").read_text().splitlines()
    return [part for line in lines for part in line.split(" ", 1)]


def converted_config(model: Path, world_size: int, flags: Sequence[Any] = ()) -> Any:
    """Make the configuration of a run that begins with a converted model.

    Args:
        model: directory of ``from_hf``.
        world_size: number of ranks.
        flags: more of them.
    """
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    import fairseq_moe  # noqa: F401

    save_dir = ["--save-dir", str(model / "saves"), "--distributed-world-size", str(world_size)]
    argv = [str(model), *split(_FLAGS), *save_dir, *flags_of(model), *map(str, flags)]
    args: Namespace = options.parse_args_and_arch(options.get_training_parser(), argv)
    return convert_namespace_to_omegaconf(args)


def build_converted(
    cfg: Any, rank: int, checkpoint: dict[str, Any], *, backend: str = "", dtype: torch.dtype = torch.float32
) -> Any:
    """Build the Trainer of this rank.

    Args:
        cfg: of ``converted_config``; it is not changed.
        rank: of this process.
        checkpoint: what its group of that name has instead.
        backend: --ddp-backend; empty: as in ``cfg``.
        dtype: of the model.
    """
    from fairseq import tasks
    from fairseq.distributed import fsdp_enable_wrap, fsdp_wrap
    from fairseq.trainer import Trainer

    cfg = deepcopy(cfg)
    cfg.distributed_training.distributed_rank = rank
    if backend:
        cfg.distributed_training.ddp_backend = backend
    cfg.checkpoint.update(checkpoint)
    task = tasks.setup_task(cfg.task)
    torch.manual_seed(cfg.common.seed)
    if backend == "fully_sharded":
        with fsdp_enable_wrap(cfg.distributed_training):
            model = fsdp_wrap(task.build_model(cfg.model))
    else:
        model = task.build_model(cfg.model).to(dtype)
    return Trainer(cfg, task, model, task.build_criterion(cfg.criterion))
