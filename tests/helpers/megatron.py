"""Make configurations with Megatron's arguments, for tests that look at what they mean and at what is refused."""

from types import SimpleNamespace
from typing import Any

from fairseq_moe.flags.moe import MoEConfig
from fairseq_moe.flags.moe_checks import moe_problems

__all__ = ["FACTOR", "GROUPS", "LAYERS", "SIGMOID", "config", "problems"]

LAYERS = 4
FACTOR = {"moe_expert_capacity_factor": 1.0}
SIGMOID = {"moe_router_score_function": "sigmoid"}
GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}


def config(**given: Any) -> MoEConfig:
    """Make the configuration of 8 experts, 4 layers, and what is given."""
    return MoEConfig.from_args({"num_experts": 8, "decoder_layers": LAYERS, **given})


def problems(world_size: int = 2, criterion: dict[str, Any] | None = None, **given: Any) -> list[str]:
    """List the problems that a training run with 8 experts, 4 layers and what is given is told of."""
    cfg = SimpleNamespace(
        model=SimpleNamespace(**{"num_experts": 8, "decoder_layers": LAYERS, **given}),
        criterion=SimpleNamespace(**(criterion or {})),
        common=SimpleNamespace(fp16=False),
        distributed_training=SimpleNamespace(ddp_backend="legacy_ddp"),
    )
    return moe_problems(cfg, world_size=world_size)
