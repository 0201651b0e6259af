"""What a checkpoint's main file says besides naming its shards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fairseq import utils
from torch import nn

from fairseq_moe.checkpoint import ModelShape
from fairseq_moe.checkpoint.groups import hyperparameters
from fairseq_moe.data.dictionary_record import DICTIONARY_KEY, dictionary_record
from fairseq_moe.flags.moe import MoEConfig
from fairseq_moe.flags.records import getter
from fairseq_moe.stock.run import run_of

__all__ = ["main_state", "model_shape"]


def model_shape(flags: Any) -> ModelShape:
    """Read off a model's flags the sizes that its checkpoints name.

    Args:
        flags: of this run, or as a checkpoint holds them.

    Raises:
        KeyError: a size is missing.
    """
    moe = MoEConfig.from_args(flags)
    return ModelShape(
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        model_dim=_size(flags, "decoder_embed_dim"),
        expert_dim=moe.expert_dim or _size(flags, "decoder_ffn_embed_dim"),
        num_layers=_size(flags, "decoder_layers"),
    )


def _size(flags: Any, name: str) -> int:
    size = getter(flags)(name)
    if size is None:
        raise KeyError(name)
    return int(size)


def main_state(trainer: Any) -> dict[str, Any]:
    """Make what the main file says of a trainer: stock's state dictionary, without tensors."""
    optimizer = None
    if not trainer.cfg.checkpoint.no_save_optimizer_state:
        stock_form = trainer.optimizer.state_dict()
        optimizer = {"param_groups": hyperparameters(stock_form["param_groups"])}
        if "loss_scale" in stock_form:
            optimizer["loss_scale"] = stock_form["loss_scale"]
    trainer._gathered_optim_state = optimizer  # stock puts this into the file in place of its own
    with _shadowed(trainer.model, "state_dict", lambda *args, **kwargs: {}):
        state = trainer.state_dict()
    state.pop("fsdp_metadata", None)
    if optimizer is None:
        state["last_optimizer_state"] = None
    run = run_of(trainer)
    if run is not None:
        state["extra_state"][DICTIONARY_KEY] = dictionary_record(run.decoder.dictionary)
    return utils.move_to_cpu(state)


@contextmanager
def _shadowed(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    module.__dict__[name] = value
    try:
        yield
    finally:
        del module.__dict__[name]
