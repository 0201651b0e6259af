"""Read which states are sharded over ranks: Megatron's --use-distributed-optimizer and --use-torch-fsdp2."""

import enum
from dataclasses import dataclass
from typing import Any

from fairseq_moe.flags.records import Group, flag, flag_name, getter, given_fields

__all__ = [
    "NOT_ELEMENTWISE",
    "Sharding",
    "ShardingConfig",
    "sharding_notes",
    "sharding_of",
    "sharding_problems",
]

# Their step looks at a whole tensor, or at which group of parameters one is in.
NOT_ELEMENTWISE = ("adafactor", "composite", "fused_lamb", "lamb", "lars")


class Sharding(enum.Enum):
    """Name what each rank holds a part of, in place of a copy."""

    OPTIMIZER = "use_distributed_optimizer"  # ZeRO-1: optimizer states, and between updates parameters
    ALL = "use_torch_fsdp2"  # ZeRO-3: parameters during a pass, too, but for the layer at work


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """Hold the flags about sharded states."""

    use_distributed_optimizer: bool = flag(
        Group.PARALLEL,
        False,
        "shard optimizer states over data ranks, and those of experts over the ranks that hold the same ones (ZeRO-1); "
        "takes the place of the --ddp-backend",
    )
    use_torch_fsdp2: bool = flag(
        Group.PARALLEL,
        False,
        "shard parameters and optimizer states so with torch's fully_shard, and gather a layer's parameters while it "
        "computes (ZeRO-3); takes the place of the --ddp-backend",
    )
    overlap_grad_reduce: bool = flag(
        Group.PARALLEL, False, "does nothing by itself: a line at the start says whether the backend overlaps"
    )
    overlap_param_gather: bool = flag(
        Group.PARALLEL, False, "does nothing by itself: a line at the start says whether the backend overlaps"
    )

    @classmethod
    def from_args(cls, args: Any) -> "ShardingConfig":
        """Read the flags from a namespace, config or mapping."""
        return cls(**given_fields(cls, args))

    @property
    def wanted(self) -> Sharding | None:
        """Name what the flags ask to shard; ``sharding_problems`` refuses both."""
        return next((kind for kind in reversed(Sharding) if getattr(self, kind.value)), None)


def sharding_of(cfg: Any) -> Sharding | None:
    """Find what torch's ``fully_shard`` shards in a run; None: nothing.

    Args:
        cfg: a whole fairseq configuration.
    """
    training = cfg.distributed_training
    if int(training.distributed_world_size) == 1 or str(training.ddp_backend) == "fully_sharded":
        return None
    return ShardingConfig.from_args(cfg.model).wanted


def sharding_problems(cfg: Any, *, has_experts: bool) -> list[str]:
    """List one sentence per reason why states cannot be sharded as the flags ask.

    Args:
        cfg: a whole fairseq configuration.
        has_experts: whether any layer has experts.
    """
    model = getattr(cfg, "model", None)
    config = ShardingConfig.from_args({} if model is None else model)
    wanted = config.wanted
    if wanted is None:
        return []
    training, name = cfg.distributed_training, flag_name(wanted.value)
    if not has_experts:
        return [
            f"{name} shards models with experts; give this one experts, or use --ddp-backend fully_sharded, which "
            "shards dense models as well."
        ]
    found = []
    if config.use_distributed_optimizer and config.use_torch_fsdp2:
        found.append(
            "--use-torch-fsdp2 shards parameters and optimizer states, --use-distributed-optimizer optimizer states; "
            "choose one."
        )
    if wanted is Sharding.ALL and str(training.ddp_backend) == "fully_sharded":
        found.append(
            "--use-torch-fsdp2 and --ddp-backend fully_sharded both shard parameters; leave one out."
        )
    if sharding_of(cfg) is None:
        return found
    optimizer = getattr(getattr(cfg, "optimizer", None), "_name", None)
    if optimizer in NOT_ELEMENTWISE:
        found.append(
            f"--optimizer {optimizer} looks at whole tensors, of which a rank holds a part with {name}; choose adam, "
            "sgd or another one that steps each number by itself."
        )
    get = getter(training)
    if str(get("ddp_comm_hook") or "none") != "none":
        found.append(
            f"--ddp-comm-hook {get('ddp_comm_hook')} belongs to --ddp-backend pytorch_ddp, whose place {name} takes; "
            "leave one out."
        )
    if (get("heartbeat_timeout") or -1) > 0:
        found.append(
            f"--heartbeat-timeout {get('heartbeat_timeout')} is not there with {name}; leave it out: "
            "--collective-timeout-sec ends a run that waits."
        )
    return found


def sharding_notes(cfg: Any, *, on_gpu: bool) -> list[str]:
    """Say, one sentence each, what the flags about sharded states and overlap come to in this run.

    Args:
        cfg: a whole fairseq configuration that has no ``sharding_problems``.
        on_gpu: whether the ranks compute on GPUs.
    """
    config, backend = ShardingConfig.from_args(cfg.model), str(cfg.distributed_training.ddp_backend)
    wanted, kind, found = config.wanted, sharding_of(cfg), []
    is_alone = int(cfg.distributed_training.distributed_world_size) == 1
    if kind is not None:
        what = "optimizer states" if kind is Sharding.OPTIMIZER else "parameters and optimizer states"
        found.append(
            f"{flag_name(kind.value)} shards {what} with torch's fully_shard, in place of --ddp-backend {backend}."
        )
    elif wanted is not None and is_alone:
        found.append(f"{flag_name(wanted.value)} has no effect on one rank, which shares states with nobody.")
    elif wanted is not None:
        found.append(
            f"{flag_name(wanted.value)} is accepted and does nothing: --ddp-backend {backend} shards optimizer states "
            "already."
        )
    for name, says in (
        ("overlap_grad_reduce", _overlap_of_sums),
        ("overlap_param_gather", _overlap_of_gathers),
    ):
        if getattr(config, name):
            reason = "one rank has nobody to talk to" if is_alone else says(kind, backend, on_gpu)
            found.append(f"{flag_name(name)} does nothing by itself: {reason}.")
    return found


def _overlap_of_sums(kind: Sharding | None, backend: str, on_gpu: bool) -> str:
    if kind is None and backend in ("legacy_ddp", "no_c10d"):
        return (
            f"--ddp-backend {backend} sums gradients after the backward pass; --use-distributed-optimizer overlaps the "
            "two on GPUs"
        )
    if not on_gpu:
        return "on a CPU a sum over ranks takes the cores that would compute"
    if kind is None and backend == "pytorch_ddp":
        return (
            "--ddp-backend pytorch_ddp overlaps the sums of dense gradients with the backward pass anyway, those of "
            "an expert's replicas come after it"
        )
    shards = "torch's fully_shard" if kind is not None else f"--ddp-backend {backend}"
    return f"{shards} reduces a layer's gradients while the layer before it computes anyway"


def _overlap_of_gathers(kind: Sharding | None, backend: str, on_gpu: bool) -> str:
    if kind is None and backend != "fully_sharded":
        return f"with --ddp-backend {backend} each rank holds all dense parameters, and nothing is gathered"
    if not on_gpu:
        return "on a CPU a gather takes the cores that would compute"
    shards = "torch's fully_shard" if kind is not None else f"--ddp-backend {backend}"
    return f"{shards} gathers a layer's parameters while the layer before it computes anyway"
