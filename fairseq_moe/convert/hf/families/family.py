"""Describe a family of models: how its config.json is read and written, and how it calls its experts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fairseq_moe.convert.hf.config_keys import ConfigKeys
from fairseq_moe.convert.hf.layout import OUR_WAY, Layout
from fairseq_moe.convert.spec import ModelSpec

__all__ = ["ExpertNames", "Family"]


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """Name the tensors of a network with experts; all but ``network`` begin where it ends.

    Args:
        network: what stands between a layer's prefix and the names below.
        router: weight of the router.
        router_bias: its bias, where its map has one.
        expert_bias: bias that moves choices.
        gate: the expert's matrix of the gate, in ``experts.ID.gate.weight``.
        up: the matrix beside it.
        down: the matrix back to the model's width.
        shared: prefix of the network that every token passes.
        shared_gate: weight of the gate on its output.
    """

    network: str = "mlp."
    router: str = "gate.weight"
    router_bias: str = "gate.bias"
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
        published: names of the experts in published files.
        fused: names where experts are stacked, as transformers 5 holds them in memory; None: as in ``published``, in
            the network ``mlp``.
        gate_up: how gate and up lie where experts are stacked.
        down: how the matrix back lies there.
        is_stacked: experts are stacked in published files too.
        num_experts_key: of the names of the number of experts that are read, the one that every transformers knows;
            None: there is one alone.
    """

    read: Callable[[ConfigKeys], ModelSpec]
    write: Callable[[ModelSpec], dict[str, Any]]
    is_latent: bool = False
    published: ExpertNames = ExpertNames()
    fused: ExpertNames | None = None
    gate_up: Layout = OUR_WAY
    down: Layout = OUR_WAY
    is_stacked: bool = False
    num_experts_key: str | None = None

    def names(self, *, fused: bool) -> ExpertNames:
        """Choose the names of the experts, stacked or one by one."""
        if not fused:
            return self.published
        return self.fused or replace(self.published, network="mlp.")
