"""Read --moe-freeze-modules: parts of MoE layers that fine-tuning leaves as they are."""

from typing import Any

from fairseq_moe.flags.records import getter, words

__all__ = ["FREEZABLE", "freeze_problems", "frozen_modules"]

FREEZABLE = ("routers", "experts")


def frozen_modules(args: Any) -> frozenset[str]:
    """Name the parts (of ``FREEZABLE``) that a model's flags leave as they are."""
    return frozenset(words(getter(args)("moe_freeze_modules") or ""))


def freeze_problems(cfg: Any, *, has_experts: bool) -> list[str]:
    """List one sentence per reason why parts cannot be frozen.

    Args:
        cfg: a whole fairseq configuration.
        has_experts: whether any layer has experts.
    """
    wanted = frozen_modules(cfg.model) if getattr(cfg, "model", None) is not None else frozenset()
    if not wanted:
        return []
    listed = " ".join(sorted(wanted))
    if not wanted <= set(FREEZABLE):
        return [f"--moe-freeze-modules is {listed!r}, expected one or both of {', '.join(FREEZABLE)}."]
    found = []
    if not has_experts:
        found.append("--moe-freeze-modules needs layers with experts; leave it out, or add them.")
    if str(cfg.distributed_training.ddp_backend) == "fully_sharded":
        found.append(
            "--moe-freeze-modules does not go with --ddp-backend fully_sharded, which trains or freezes a "
            "whole layer at a time; use --use-torch-fsdp2 in its place, legacy_ddp or pytorch_ddp."
        )
    return found
