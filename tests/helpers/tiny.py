"""Build tiny models under fairseq's own Trainer, and read what one update does to them. For forked ranks only."""

import os
import pickle
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed import fsdp_enable_wrap, fsdp_wrap
from fairseq.logging import metrics
from fairseq.trainer import Trainer
from omegaconf import OmegaConf
from torch import Tensor

import fairseq_moe  # noqa: F401
from fairseq_moe.distributed import broadcast_value, gather_values, rank, world_size
from fairseq_moe.stock.find_experts import moe_decoder
from fairseq_moe.stock.run import run_of
from fairseq_moe.stock.sharding.sharded_model import ShardedModel

__all__ = ["TINY_FLAGS", "build_trainer", "gradients", "make_batch", "parameters", "update"]

_VOCABULARY = 40
_FIRST_WORD = 4  # after <s>, <pad>, </s> and <unk>
_PAD = 1
CONFIG_CACHE_VARIABLE = (
    "FAIRSEQ_MOE_TEST_CONFIGS"  # set by conftest: a folder that lives as long as the session
)
_REGISTRIES = ("task", "arch", "criterion", "optimizer", "lr_scheduler")

TINY_FLAGS = [
    "--task", "dummy_lm", "--dict-size", str(_VOCABULARY), "--tokens-per-sample", "16", "--batch-size", "2",
    "--arch", "transformer_lm_gpt", "--share-decoder-input-output-embed", "--decoder-layers", "2",
    "--decoder-embed-dim", "8", "--decoder-ffn-embed-dim", "12", "--decoder-attention-heads", "2",
    "--dropout", "0", "--attention-dropout", "0", "--seed", "3", "--cpu", "--distributed-backend", "gloo",
    "--lr-scheduler", "fixed", "--lr", "0.5", "--optimizer", "sgd", "--clip-norm", "0",
    "--moe-freq", "2", "--moe-expert-count", "4", "--moe-second-expert-policy", "all",
    "--criterion", "moe_cross_entropy", "--moe-gate-loss-wt", "0.1",
    "--save-dir", os.path.join(tempfile.gettempdir(), "no-such-directory"),  # two at a time would lock each other out
]  # fmt: skip


def build_trainer(flags: Sequence[Any] = (), *, dtype: torch.dtype = torch.float32) -> Trainer:
    """Build fairseq's Trainer on this rank, as fairseq-train does.

    Args:
        flags: in addition to ``TINY_FLAGS``; the last one of a name counts.
        dtype: float64 for exact comparisons; other precisions are asked for by flags.
    """
    cfg = broadcast_value(_config(flags) if rank() == 0 else None)
    cfg.distributed_training.distributed_rank = rank()
    metrics.reset()
    task = tasks.setup_task(cfg.task)
    torch.manual_seed(cfg.common.seed)
    if cfg.distributed_training.ddp_backend == "fully_sharded":
        with fsdp_enable_wrap(cfg.distributed_training):
            model = fsdp_wrap(task.build_model(cfg.model))
    else:
        model = task.build_model(cfg.model).to(dtype)
    return Trainer(cfg, task, model, task.build_criterion(cfg.criterion))


def _config(flags: Sequence[Any]) -> Any:
    """Make the configuration that these flags give.

    fairseq composes it with hydra, which takes most of a second. In a test session that is done once for each
    set of registered classes; the values of further flags are put into a copy.
    """
    args = _parse([*TINY_FLAGS, *map(str, flags), "--distributed-world-size", str(world_size())])
    folder = os.environ.get(CONFIG_CACHE_VARIABLE)
    if folder is None:
        return convert_namespace_to_omegaconf(args)
    plain_args, cfg = _plain_config(Path(folder), {name: getattr(args, name) for name in _REGISTRIES})
    changed = {name: value for name, value in vars(args).items() if value != plain_args.get(name)}
    for group in cfg.values():
        if isinstance(group, Namespace):
            vars(group).update(vars(args))
        elif OmegaConf.is_config(group):
            group.update({name: value for name, value in changed.items() if name in group})
    return cfg


def _plain_config(folder: Path, choices: dict[str, str]) -> tuple[dict[str, Any], Any]:
    """Make arguments and configuration of ``TINY_FLAGS`` with these registered classes."""
    cached = folder / "-".join(choices.values())
    if not cached.exists():
        argv = [part for name, value in choices.items() for part in (f"--{name.replace('_', '-')}", value)]
        args = _parse([*TINY_FLAGS, *argv])
        part = folder / str(os.getpid())
        part.write_bytes(pickle.dumps((vars(args), convert_namespace_to_omegaconf(args))))
        part.rename(cached)
    return pickle.loads(cached.read_bytes())


def _parse(argv: list[str]) -> Namespace:
    return options.parse_args_and_arch(options.get_training_parser(), argv)


def make_batch(seed: int, *, num_sequences: int = 2, length: int = 8, num_padded: int = 0) -> dict[str, Any]:
    """Draw a language-modelling batch of random words, in the form of fairseq's collater.

    Args:
        seed: of the words.
        num_sequences: B.
        length: S.
        num_padded: padding tokens at the end of the last sequence.
    """
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(_FIRST_WORD, _VOCABULARY, (num_sequences, length + 1), generator=generator)
    tokens, target = words[:, :-1].clone(), words[:, 1:].clone()
    if num_padded:
        tokens[-1, -num_padded:] = _PAD
        target[-1, -num_padded:] = _PAD
    return {
        "id": torch.arange(num_sequences),
        "nsentences": num_sequences,
        "ntokens": int((target != _PAD).sum()),
        "net_input": {"src_tokens": tokens, "src_lengths": (tokens != _PAD).sum(1)},
        "target": target,
    }


def update(trainer: Trainer, micro_batches: Sequence[Any]) -> dict[str, float]:
    """Do one ``train_step``; returns the numbers that it logs for all ranks, not rounded, or {} if it was skipped."""
    metrics.reset()
    if trainer.train_step(list(micro_batches)) is None:
        return {}
    meters = metrics.get_meters("train")
    names = [name for name in meters if hasattr(meters[name], "avg")]
    return {name: float(meters[name].avg) for name in names} | {
        "sample_size": float(meters["loss"].count),
    }


def parameters(trainer: Trainer) -> dict[str, Tensor]:
    """Gather every parameter of the whole model by its name; of an expert's, with the expert's global number.

    Collective. Copies of the same tensor on different ranks must be equal to the bit.
    """
    return _merged(trainer, _local_state(trainer))


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Gather the gradients that the last update stepped with, in the form of ``parameters``."""
    with _gradients_as_data(trainer):
        state = _local_state(trainer)
    return _merged(trainer, state)


def _local_state(trainer: Trainer) -> dict[str, Tensor]:
    run = run_of(trainer)
    if run is None:
        return {name: tensor.detach().clone() for name, tensor in trainer.get_model().state_dict().items()}
    return {name: tensor.detach().clone() for name, tensor in run.state.model_tensors().items()}


@contextmanager
def _gradients_as_data(trainer: Trainer) -> Any:
    is_sharded = isinstance(trainer.model, ShardedModel)
    held = [p for p in (trainer.model if is_sharded else trainer.get_model()).parameters() if p.requires_grad]
    values = [parameter.data for parameter in held]
    for parameter in held:
        assert parameter.grad is not None
        parameter.data = parameter.grad
    try:
        yield
    finally:
        for parameter, value in zip(held, values, strict=True):
            parameter.data = value


def _merged(trainer: Trainer, state: dict[str, Tensor]) -> dict[str, Tensor]:
    decoder = moe_decoder(trainer.get_model())
    assert decoder is not None
    ids = decoder.mesh.layout.local_ids(rank())
    own: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".experts." in name:
            own.update({f"{name}[{expert}]": tensor[local] for local, expert in enumerate(ids)})
        else:
            own[name] = tensor
    whole: dict[str, Tensor] = {}
    for other in gather_values(own):
        for name, tensor in other.items():
            assert torch.equal(whole.setdefault(name, tensor), tensor), f"ranks hold different {name}"
    assert whole, "the model has no parameters"
    return whole
