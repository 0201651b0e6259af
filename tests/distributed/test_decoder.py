"""The decoder around its MoE layers: activation checkpointing, and decoding one token at a time.

Run with ``pytest tests/distributed/test_decoder.py``.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.ranks import run_ranks


def _update(rank: int, flags: list[Any]) -> tuple[dict[str, float], dict[str, Tensor]]:
    from tests.helpers.tiny import build_trainer, gradients, make_batch, update

    trainer = build_trainer(["--moe-gate-loss-wt", 0.5, "--decoder-layers", 4, *flags])
    return update(trainer, [make_batch(rank, length=9)]), gradients(trainer)


@pytest.mark.parametrize("policy", ["all", "sampling", "random"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_activation_checkpointing_changes_no_gradient_and_counts_once(policy: str, world_size: int) -> None:
    """With dropout and with random routing, so that the second pass must see the same random numbers."""
    flags = ["--dropout", 0.3, "--activation-dropout", 0.2, "--attention-dropout", 0.1]
    flags += ["--moe-second-expert-policy", policy]
    logged, gradients = run_ranks(_update, world_size, flags)[0]
    found_logged, found_gradients = run_ranks(_update, world_size, [*flags, "--checkpoint-activations"])[0]
    timing = {name for name in logged if "time" in name} | {"ups", "wps", "wall", "train_wall"}
    assert {name: value for name, value in found_logged.items() if name not in timing} == {
        name: value for name, value in logged.items() if name not in timing
    }
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, msg=name)


def _decode(rank: int, flags: list[Any]) -> None:
    from tests.helpers.tiny import build_trainer, make_batch

    model = build_trainer(flags).get_model().eval()
    tokens = make_batch(0, num_sequences=3, length=12)["net_input"]["src_tokens"]
    with torch.no_grad():
        whole, _ = model(tokens)
        for sequences in (tokens, tokens[:1]):
            state: dict[str, Any] = {}
            steps = [
                model.decoder(sequences[:, :length], incremental_state=state)[0]
                for length in range(1, tokens.shape[1] + 1)
            ]
            found = torch.cat(steps, dim=1)
            torch.testing.assert_close(found, whole[: len(sequences)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("top_k", [[], ["--moe-top1-expert"]], ids=["top2", "top1"])
def test_one_token_at_a_time_equals_the_whole_and_ignores_neighbours(top_k: list[str]) -> None:
    """Evaluation of the whole gets room for all tokens; generation never drops any."""
    run_ranks(_decode, 1, ["--moe-eval-capacity-token-fraction", 1, *top_k])


def _decode_with_capacity(rank: int) -> None:
    from fairseq_moe.stock.find_experts import moe_decoder
    from tests.helpers.layer_stats import load_of
    from tests.helpers.tiny import build_trainer, make_batch

    model = build_trainer(["--moe-generation-capacity-token-fraction", 0.25]).get_model().eval()
    decoder = moe_decoder(model)
    assert decoder is not None
    with torch.no_grad():
        decoder.layers[1].moe_layer.router.weight.zero_()  # every token to experts 0 and 1
        tokens = make_batch(0, num_sequences=8, length=1)["net_input"]["src_tokens"]
        _, extra = model.decoder(tokens, incremental_state={})
    assert load_of(extra["moe_aux"][1]).tolist() == [[8, 8, 0, 0], [2, 2, 0, 0]]


def test_generation_can_be_given_a_capacity() -> None:
    run_ranks(_decode_with_capacity, 1)
