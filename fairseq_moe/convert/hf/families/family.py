"""Describe a family of models: how its config.json is read and written, and how it calls its experts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fairseq_moe.convert.hf.config_keys import ConfigKeys
from fairseq_moe.convert.spec import ModelSpec

__all__ = ["ExpertNames", "Family"]


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """Name the tensors of a network with experts; all but ``network`` begin where it ends.

    Args:
        network: what stands between a layer's prefix and the names below.
        router: weight of the router.
        expert_bias: bias that moves choices.
        gate: the expert's matrix of the gate, in ``experts.ID.gate.weight``.
        up: the matrix beside it.
        down: the matrix back to the model's width.
        shared: prefix of the network that every token passes.
        shared_gate: weight of the gate on its output.
    """

    network: str = "mlp."
    router: str = "gate.weight"
    expert_bias: str = "gate.e_score_correction_bias"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_experts."
    shared_gate: str = "shared_expert_gate.weight"


@dataclass(frozen=True, kw_only=True)
class Family:
    """Describe one family of published models.

    Args:
        read: makes the model of a config.json.
        write: makes the keys of a config.json that are this family's own, for a model that it may not have.
        is_latent: its attention is latent (MLA); of another model nothing is written.
        knows_parts: heads may turn in part, by ``partial_rotary_factor``.
        routes_in_float32: its routers compute in float32 whatever the model does.
        runs_as: ``model_type`` of transformers that computes it; None: its own.
        published: names of the experts in published files.
        fused: names where experts are stacked, as transformers 5 holds them in memory; None: as in ``published``, in
            the network ``mlp``.
        num_experts_key: of the names of the number of experts that are read, the one that every transformers knows;
            None: there is one alone.
    """

    read: Callable[[ConfigKeys], ModelSpec]
    write: Callable[[ModelSpec], dict[str, Any]]
    is_latent: bool = False
    knows_parts: bool = False
    routes_in_float32: bool = False
    runs_as: str | None = None
    published: ExpertNames = ExpertNames()
    fused: ExpertNames | None = None
    num_experts_key: str | None = None

    def names(self, *, fused: bool) -> ExpertNames:
        """Choose the names of the experts, stacked or one by one."""
        if not fused:
            return self.published
        return self.fused or replace(self.published, network="mlp.")
