"""A batch that keeps a rank without data in step with the others."""

from typing import Any

import torch

__all__ = ["as_dummy", "dummy_batch", "is_dummy", "without_dummy"]


def dummy_batch(dictionary: Any, *, add_bos_token: bool) -> dict[str, Any]:
    """Make a batch of one token that takes no capacity at any expert and scores nothing.

    Args:
        dictionary: of the targets.
        add_bos_token: the scorer expects a begin-of-sentence token first and leaves it out.
    """
    target = dictionary.bos() if add_bos_token else dictionary.pad()
    return {
        "id": torch.tensor([-1]),
        "nsentences": 0,
        "ntokens": 0,
        "net_input": {
            "src_tokens": torch.tensor([[dictionary.eos()]]),
            "src_lengths": torch.tensor([1]),
            "all_padding": True,
        },
        "target": torch.tensor([[target]]),
    }


def as_dummy(sample: dict[str, Any]) -> dict[str, Any]:
    """Make a batch of the shape of ``sample`` whose tokens take no capacity and enter no statistic."""
    return {**sample, "net_input": {**sample["net_input"], "all_padding": True}}


def is_dummy(sample: dict[str, Any]) -> bool:
    """Tell whether a batch only keeps this rank in step with the others."""
    return bool(sample.get("net_input", {}).get("all_padding", False))  # some stock tasks have no net_input


def without_dummy(loss: Any, sample_size: Any, logged: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Count a dummy batch as nothing: in the sample size and in what is logged."""
    return loss, sample_size * 0, {key: value * 0 for key, value in logged.items()}
