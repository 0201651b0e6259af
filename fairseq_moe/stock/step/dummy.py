"""A batch that keeps a rank without data in step with the others."""

from typing import Any

import torch

__all__ = ["dummy_batch"]


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
