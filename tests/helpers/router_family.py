"""Give flags and batches to a tiny model with Megatron's routing: expert bias, shared experts, losses, capacity."""

from typing import Any

from tests.helpers.updates import BATCHES

__all__ = ["EXPERTS", "GLOBAL", "MEGATRON", "WIDTH", "router_batches", "routers"]

EXPERTS, WIDTH = 4, 8
# Sizes differ between ranks, the last micro-batch is the smallest, and some tokens are dropped (checked).
MEGATRON = (
    "--moe-freq", 0, "--moe-expert-count", 0, "--moe-second-expert-policy", "sampling", "--moe-gate-loss-wt", 1,
    "--num-experts", EXPERTS, "--moe-layer-freq", "[0,1]", "--decoder-layers", 2,
    "--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias", "--moe-router-bias-update-rate", 0.01,
    "--moe-router-load-balancing-type", "aux_loss,seq_aux_loss", "--moe-aux-loss-coeff", "0.2,0.1",
    "--moe-z-loss-coeff", 0.05, "--moe-expert-capacity-factor", 1.0, "--moe-shared-expert-intermediate-size", 6,
    "--moe-shared-expert-gate", "--use-moe-pad-mask",
)  # fmt: skip
GLOBAL = ("--moe-router-load-balancing-type", "aux_loss,global_aux_loss")


def router_batches(rank: int, world_size: int, num_micro: int) -> list[Any]:
    """Make the micro-batches of ``rank``, with one padding token in each longer one."""
    from tests.helpers.tiny import make_batch

    found = []
    for micro in range(num_micro):
        seed, sequences, length = BATCHES[(rank + world_size * micro) % len(BATCHES)]
        padded = 1 if length > 8 else 0
        found.append(make_batch(seed, num_sequences=sequences, length=length, num_padded=padded))
    return found


def routers(trainer: Any) -> list[Any]:
    """Find the routers of a trainer's MoE layers, in the order of layers."""
    from fairseq_moe.stock.find_experts import moe_decoder

    decoder = moe_decoder(trainer.get_model())
    assert decoder is not None
    return decoder.routers()
