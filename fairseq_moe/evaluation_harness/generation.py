"""Continue prompts of different lengths greedily, in one batch and without padding."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["continue_greedily"]


@torch.no_grad()
def continue_greedily(
    decoder: Any,
    prompts: Sequence[Sequence[int]],
    *,
    num_new: int,
    end: int,
    is_done: Callable[[list[int]], bool],
) -> list[list[int]]:
    """Take the likeliest token again and again.

    All prompts go through the model together, token by token; a longer one keeps its own token where a shorter one
    takes a new one already, as prefixes do in fairseq. So no position is padding, and batches change only the speed.

    Args:
        decoder: of fairseq, in evaluation mode.
        prompts: ids, at least one each.
        num_new: how many tokens each gets at most.
        end: token that ends an answer.
        is_done: tells of the new tokens of a prompt whether they are enough.

    Returns:
        the new tokens of each prompt, without the one that ends it.
    """
    device = next(decoder.parameters()).device
    new: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompt each row of the batch is
    lengths = [len(prompt) for prompt in prompts]
    ids = torch.zeros((len(prompts), max(lengths) + num_new), dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    state: dict[str, Any] = {}
    length = 1
    while rows:
        logits: Tensor = decoder(ids[:, :length], incremental_state=state)[0][:, -1]
        kept = []
        for position, (row, token) in enumerate(zip(rows, logits.argmax(dim=-1).tolist(), strict=True)):
            if length >= lengths[row]:
                if token == end:
                    continue
                new[row].append(token)
                ids[position, length] = token
                if len(new[row]) == num_new or is_done(new[row]):
                    continue
            kept.append(position)
        if len(kept) < len(rows):
            order = torch.tensor(kept, dtype=torch.int64, device=device)
            ids, rows = ids[order], [rows[position] for position in kept]
            if rows:
                decoder.reorder_incremental_state_scripting(state, order)
        length += 1
    return new
