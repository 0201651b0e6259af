"""Decoding through a window: what is remembered, absolute positions, beams that change places, and padding.

Run with ``pytest tests/unit/models/test_window_cache.py``.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import fairseq_moe.modules.blocks.attend as attend
from tests.helpers.presets import WordIds, build_model, parse

V, S, WINDOW = 31, 14, 4
FLAGS = (
    "--decoder-layers 2 --decoder-embed-dim 32 --decoder-attention-heads 4 --decoder-kv-heads 2 --dropout 0 "
    "--attention-dropout 0 --decoder-ffn-embed-dim 24 --no-scale-embedding --position-embedding rope --init-std 0.3 "
    f"--attention-sinks --attention-window {WINDOW} --attention-window-layers [1,0]"
)


def decoder(pad: int | None = None) -> Any:
    torch.manual_seed(0)
    return build_model(parse("transformer_lm_gpt", FLAGS.split()), WordIds(V, pad=pad)).eval().decoder


def words(batch: int) -> Tensor:
    return torch.randint(2, V, (batch, S), generator=torch.Generator().manual_seed(1))


def caches(model: Any, state: dict[str, Any]) -> list[dict[str, Tensor]]:
    return [layer.get_incremental_state(state, "attention") for layer in model.layers]


def step_by_step(model: Any, ids: Tensor, first: int = 1) -> tuple[Tensor, dict[str, Any]]:
    """Score the last position of each beginning of the sequences, from one of ``first`` words on."""
    state: dict[str, Any] = {}
    with torch.no_grad():
        steps = [model(ids[:, :end], incremental_state=state)[0] for end in range(first, ids.shape[1] + 1)]
    return torch.cat(steps, 1), state


def whole(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        scores: Tensor = model(ids)[0]
    return scores


def test_a_window_remembers_what_later_tokens_can_see() -> None:
    model, ids = decoder(), words(2)
    found, state = step_by_step(model, ids)
    torch.testing.assert_close(found, whole(model, ids), atol=1e-5, rtol=1e-5)
    limited, full = caches(model, state)
    for cache, length in ((limited, WINDOW - 1), (full, S)):
        sizes = {name: tuple(value.shape) for name, value in cache.items() if name != "forgotten"}
        assert sizes == {"key": (2, 2, length, 8), "value": (2, 2, length, 8), "padding": (2, length)}
    for value in limited.values():  # no view of more
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_positions_stay_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = decoder(), words(2)
    expected = whole(model, ids)
    monkeypatch.setattr(
        attend, "_num_forgotten", lambda cache: 0
    )  # as if positions began anew in each window
    assert float((step_by_step(model, ids)[0] - expected).abs().max()) > 1e-2


def test_a_window_of_one_token_remembers_none_less(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = decoder(), words(2)
    forget = attend.forget
    short = lambda cache, *, num_kept, dims: forget(cache, num_kept=num_kept - 1, dims=dims)  # noqa: E731
    monkeypatch.setattr("fairseq_moe.modules.blocks.grouped.forget", short)
    assert float((step_by_step(model, ids)[0] - whole(model, ids)).abs().max()) > 1e-2


@pytest.mark.parametrize("half", [2, 9])
def test_beams_change_places(half: int) -> None:
    model, ids, order = decoder(), words(3), torch.tensor([2, 0, 2, 1])
    _, state = step_by_step(model, ids[:, :half])
    for layer in model.layers:
        layer.reorder_incremental_state(state, order)
    chosen = ids[order].clone()
    chosen[:, half:] = words(4)[:, half:]
    with torch.no_grad():
        steps = [model(chosen[:, :end], incremental_state=state)[0] for end in range(half + 1, S + 1)]
    torch.testing.assert_close(torch.cat(steps, 1), whole(model, chosen)[:, half:], atol=1e-5, rtol=1e-5)


def test_padding_is_forgotten_with_its_positions() -> None:
    model, ids = decoder(pad=1), words(2)
    ids[0, :6] = 1
    found, state = step_by_step(model, ids)
    torch.testing.assert_close(found[:, 6:], whole(model, ids)[:, 6:], atol=1e-5, rtol=1e-5)
    limited, full = caches(model, state)
    assert full["padding"].sum() == 6 and limited["padding"].shape[1] == WINDOW - 1
    assert limited["forgotten"].shape[1] == S - WINDOW + 1
