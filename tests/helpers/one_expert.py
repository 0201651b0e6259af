"""Build an MoE layer whose router sends all tokens to one expert, for each dispatcher."""

from typing import Any

import torch

__all__ = ["ALLGATHER", "DROPLESS", "LIMITED", "PADDED", "D", "E", "layer_of"]

D, F, E = 8, 16, 4
DROPLESS = {"num_experts": E, "moe_router_topk": 1, "moe_router_pre_softmax": True}
LIMITED = DROPLESS | {"moe_expert_capacity_factor": 1.25}
PADDED = LIMITED | {"moe_pad_expert_input_to_capacity": True}
ALLGATHER = DROPLESS | {"moe_token_dispatcher_type": "allgather"}


def layer_of(flags: dict[str, Any], mesh: Any) -> Any:
    """Build a layer whose router sends every token with a positive mean to expert 0, then to expert 1."""
    from fairseq_moe.flags.moe import MoEConfig
    from fairseq_moe.models.decoder_layer import build_moe_layer

    torch.manual_seed(5)
    networks = {"activation": torch.nn.functional.gelu, "activation_dropout": 0.0, "dropout": 0.0}
    layer = build_moe_layer(MoEConfig.from_args(flags), mesh, model_dim=D, hidden_dim=F, **networks)
    with torch.no_grad():
        layer.router.weight.copy_(torch.linspace(1.0, -1.0, E)[:, None].expand(E, D))
    return layer.double()
