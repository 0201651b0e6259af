"""Losses, loads and statistics of padded batches: those of transformers with an attention mask, at any padding."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from fairseq_moe.modules import LOSSES
from fairseq_moe.modules.routing.stats import LAYER_STATS
from tests.helpers.families import VOCABULARY, build_pair
from tests.helpers.layer_stats import load_of, stats_of

_LENGTHS = (40, 3, 3, 3)
_FLAGS = "--moe-aux-loss-coeff 0.01 --moe-z-loss-coeff 0.001"
_FAMILIES = ("mixtral", "olmoe", "qwen3")  # with softmax and its balancing loss


def batch(width: int, pad: int) -> Tensor:
    """int64 (4, width), sentences with ``pad`` behind them."""
    generator = torch.Generator().manual_seed(2)
    ids_BS = torch.full((len(_LENGTHS), width), pad)
    for row, length in enumerate(_LENGTHS):
        ids_BS[row, :length] = torch.randint(0, VOCABULARY, (length,), generator=generator)
    return ids_BS


def our_auxes(ours: Any, width: int) -> list[Any]:
    with torch.no_grad():
        extra = ours.train()(batch(width, ours.decoder.padding_idx))[1]
    return [aux for aux in extra["moe_aux"] if aux is not None]


@pytest.mark.parametrize("name", _FAMILIES)
@pytest.mark.parametrize("width", [40, 64])
def test_balance_and_z_loss_are_those_of_the_words(name: str, width: int) -> None:
    theirs, ours = build_pair(name, _FLAGS)
    ids_BS = batch(width, ours.decoder.padding_idx)
    there_BS = ids_BS.ne(ours.decoder.padding_idx).long()
    with torch.no_grad():
        logits = theirs(ids_BS * there_BS, attention_mask=there_BS, output_router_logits=True).router_logits
    auxes = our_auxes(ours, width)
    assert len(auxes) == len(logits)
    top_k = ours.decoder.moe.top_k
    for aux, logits_TE in zip(auxes, logits, strict=True):
        found = dict(zip(LOSSES, aux.losses.tolist(), strict=True))
        expected = load_balancing_loss_func((logits_TE,), logits_TE.shape[-1], top_k, there_BS)
        assert found["aux"] == pytest.approx(float(expected) / top_k, rel=1e-5)
        words_TE = logits_TE[there_BS.reshape(-1).bool()].float()
        assert found["z"] == pytest.approx(float(torch.logsumexp(words_TE, -1).square().mean()), rel=1e-5)


def test_statistics_and_loads_are_those_of_the_words() -> None:
    _, ours = build_pair("mixtral", _FLAGS + " --moe-expert-capacity-factor 1.0")
    for narrow, wide in zip(our_auxes(ours, 40), our_auxes(ours, 64), strict=True):
        assert float(load_of(narrow)[0].sum()) == 2 * sum(_LENGTHS)
        assert 0 < float(load_of(narrow)[1].sum()) < 2 * sum(_LENGTHS)  # some are dropped
        assert torch.equal(load_of(narrow), load_of(wide))
        torch.testing.assert_close(stats_of(narrow), stats_of(wide), rtol=1e-5, atol=1e-6)
        assert float(stats_of(narrow)[LAYER_STATS.index("entropy_gating")]) > 0


def test_these_tests_see_padding_that_is_routed() -> None:
    _, ours = build_pair("mixtral", _FLAGS + " --use-moe-pad-mask false")
    narrow, wide = (our_auxes(ours, width)[0] for width in (40, 64))
    assert abs(float(narrow.losses[LOSSES.index("aux")] - wide.losses[LOSSES.index("aux")])) > 1e-3
    assert not torch.equal(load_of(narrow), load_of(wide))


def test_generation_does_not_see_the_mask() -> None:
    outputs = []
    for flag in ("true", "false"):
        _, ours = build_pair("mixtral", f"--use-moe-pad-mask {flag}")
        state: dict[str, Any] = {}
        ids_BS = batch(40, ours.decoder.padding_idx)
        with torch.no_grad():
            steps = [ours.decoder(ids_BS[:, : step + 1], incremental_state=state)[0] for step in range(8)]
        outputs.append(torch.cat(steps, 1))
    is_word_BS = ids_BS[:, :8].ne(ours.decoder.padding_idx)
    torch.testing.assert_close(outputs[0][is_word_BS], outputs[1][is_word_BS])
