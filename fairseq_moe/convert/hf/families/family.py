"""Describe a family of models: how its config.json is read and written, and how it calls its experts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fairseq_moe.convert.hf.config_keys import ConfigKeys
from fairseq_moe.convert.hf.layout import OUR_WAY, Layout
from fairseq_moe.convert.spec import ModelSpec

__all__ = ["FUSED", "ExpertNames", "Family"]

FUSED = ("experts.gate_up_proj", "experts.down_proj")


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """Name the tensors of a network with experts; all but ``network`` begin where it ends.

    Args:
        network: what stands between a layer's prefix and the names below.
        router: weight of the router.
        router_bias: its bias, where its map has one.
        expert_bias: bias that moves choices.
        bias_rows: of that bias, which has one value per expert in each; None: it has no rows.
        stacked: of the matrices of all experts, the gate's rows before those of up, and back to the model's width;
            None: experts lie one by one.
        gate: the expert's matrix of the gate, in ``experts.ID.gate.weight``.
        up: the matrix beside it.
        down: the matrix back to the model's width.
        shared: prefix of the network that every token passes.
        shared_gate: weight of the gate on its output.
        beside: prefix of that network where it stands beside the one with experts, after the layer's prefix.
        beside_rows: its two matrices, the gate's rows before those of up in the first; None: three, as of experts.
    """

    network: str = "mlp."
    router: str = "gate.weight"
    router_bias: str = "gate.bias"
    expert_bias: str = "gate.e_score_correction_bias"
    bias_rows: int | None = None
    stacked: tuple[str, str] | None = None
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_experts."
    shared_gate: str = "shared_expert_gate.weight"
    beside: str | None = None
    beside_rows: tuple[str, str] | None = None


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
        gate_up: how gate and up lie where experts are stacked.
        down: how the matrix back lies there.
        head_norms: of queries and keys.
        left_out: tensors that published files may hold and transformers does not read; None: there are none.
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
    gate_up: Layout = OUR_WAY
    down: Layout = OUR_WAY
    head_norms: tuple[str, str] = ("q_norm", "k_norm")
    left_out: str | None = None
    num_experts_key: str | None = None

    def names(self, *, fused: bool) -> ExpertNames:
        """Choose the names of the experts, stacked or one by one."""
        if not fused:
            return self.published
        names = self.fused or replace(self.published, network="mlp.")
        return replace(names, stacked=FUSED)
