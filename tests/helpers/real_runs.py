"""Run fairseq-train on the text of ``tests.helpers.data``, as a command and step by step."""

from pathlib import Path
from typing import Any

from tests.helpers.ranks import USER_DIR, CommandResult, run_cli

__all__ = ["MODEL", "TRAINING", "RealRun", "train"]

MODEL = [
    "--task", "language_modeling", "--tokens-per-sample", "32", "--sample-break-mode", "none",
    "--arch", "transformer_lm_gpt", "--share-decoder-input-output-embed", "--decoder-layers", "2",
    "--decoder-embed-dim", "16", "--decoder-ffn-embed-dim", "32", "--decoder-attention-heads", "2",
    "--moe-freq", "2", "--moe-expert-count", "4", "--criterion", "moe_cross_entropy",
]  # fmt: skip
TRAINING = [
    "--optimizer", "adam", "--adam-betas", "(0.9,0.98)", "--lr", "0.01", "--lr-scheduler", "inverse_sqrt",
    "--warmup-updates", "4", "--dropout", "0.1", "--batch-size", "2", "--num-workers", "0", "--seed", "3",
    "--cpu",
    "--required-batch-size-multiple", "1", "--disable-validation", "--log-format", "json", "--log-interval",
    "1", "--no-epoch-checkpoints",
]  # fmt: skip


def train(data: Path, save_dir: Path, *flags: Any, world_size: int = 2) -> CommandResult:
    """Run fairseq-train on that text in forked processes."""
    argv = [data, "--user-dir", USER_DIR, *MODEL, *TRAINING, "--save-dir", save_dir, *flags]
    return run_cli("fairseq_cli.train", argv, world_size=world_size)


class RealRun:
    """A run of fairseq-train under the caller's control: it loads at once, and trains and saves when it is told to.

    Args:
        data: directory of the text.
        save_dir: where checkpoints go.
        world_size: number of ranks, all of which build one.
        flags: in addition to ``MODEL`` and ``TRAINING``.
    """

    def __init__(self, data: str, save_dir: str, world_size: int, *flags: Any) -> None:
        from fairseq import checkpoint_utils, options, tasks
        from fairseq.dataclass.utils import convert_namespace_to_omegaconf
        from fairseq.distributed import fsdp_enable_wrap, fsdp_wrap
        from fairseq.trainer import Trainer

        import fairseq_moe  # noqa: F401

        argv = [
            data, *MODEL, *TRAINING, "--save-dir", save_dir, "--distributed-world-size", str(world_size),
            *map(str, flags),
        ]  # fmt: skip
        args = options.parse_args_and_arch(options.get_training_parser(), input_args=argv)
        cfg = convert_namespace_to_omegaconf(args)
        task = tasks.setup_task(cfg.task)
        if cfg.distributed_training.ddp_backend == "fully_sharded":
            with fsdp_enable_wrap(cfg.distributed_training):
                model = fsdp_wrap(task.build_model(cfg.model))
        else:
            model = task.build_model(cfg.model)
        self.cfg = cfg
        self.trainer = Trainer(cfg, task, model, task.build_criterion(cfg.criterion))
        _, self.epoch_itr = checkpoint_utils.load_checkpoint(cfg.checkpoint, self.trainer)
        self._batches: Any = None

    def train(self, num_updates: int) -> list[dict[str, float]]:
        """Do so many updates; returns loss and gradient norm of each, not rounded."""
        from fairseq.data import iterators

        from tests.helpers.tiny import update

        (update_freq,) = self.cfg.optimization.update_freq
        if self._batches is None:
            self._batches = iter(iterators.GroupedIterator(self.epoch_itr.next_epoch_itr(), update_freq))
        found = [update(self.trainer, next(self._batches)) for _ in range(num_updates)]
        names = ("loss", "moe_gate_loss", "gnorm")  # another criterion has no gate loss
        return [{name: logged[name] for name in names if name in logged} for logged in found]

    def save(self) -> None:
        """Save a checkpoint as stock does."""
        from fairseq import checkpoint_utils

        if self._batches is None:
            self.epoch_itr.next_epoch_itr()
        checkpoint_utils.save_checkpoint(self.cfg.checkpoint, self.trainer, self.epoch_itr, None)
