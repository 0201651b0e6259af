"""Build a decoder layer with experts, and its ``MoELayer`` from the flags."""

from typing import Any

import torch
import torch.nn.functional as F
from fairseq.distributed import fsdp_wrap
from fairseq.models.transformer import TransformerConfig
from fairseq.modules import gelu, transformer_layer
from torch import Tensor

from fairseq_moe.distributed import ParallelMesh
from fairseq_moe.distributed.sequence import shards_of
from fairseq_moe.flags.moe import MoEConfig
from fairseq_moe.modules import (
    AllToAllDispatcher,
    Dispatcher,
    Experts,
    LocalDispatcher,
    MoELayer,
    Router,
    SharedExperts,
    TokenInfo,
)
from fairseq_moe.modules.dispatch.allgather import AllGatherDispatcher
from fairseq_moe.modules.dispatch.dispatcher import plan_kept
from fairseq_moe.modules.dispatch.exchange import Exchange, NoExchange, TimedExchange
from fairseq_moe.modules.dispatch.padded import plan_padded
from fairseq_moe.modules.kernels.swiglu import is_gated
from fairseq_moe.modules.moe_layer import RoutingMemo
from fairseq_moe.parallel.placement import EXPERT, expert_placements, marks_of, place

__all__ = ["MoEDecoderLayer", "build_moe_layer", "expert_activation"]


class MoEDecoderLayer(transformer_layer.TransformerDecoderLayerBase):
    """Attend, then let experts stand in the place of the feed-forward network.

    Args:
        cfg: fairseq's structured transformer configuration.
        moe: the expert flags.
        mesh: process groups.
    """

    def __init__(self, cfg: TransformerConfig, moe: MoEConfig, mesh: ParallelMesh) -> None:
        super().__init__(cfg, no_encoder_attn=True)
        self.moe_layer = build_moe_layer(
            moe,
            mesh,
            model_dim=self.embed_dim,
            hidden_dim=moe.expert_dim or cfg.decoder.ffn_embed_dim,
            activation=expert_activation(self.activation_fn),
            activation_dropout=self.activation_dropout_module.p,
            dropout=self.dropout_module.p,
        )

    def build_fc1(self, *args: Any) -> None:
        """Build no dense feed-forward network: it would only take memory."""

    def build_fc2(self, *args: Any) -> None:
        """Build no dense feed-forward network: it would only take memory."""

    def forward(
        self,
        x: Tensor,
        encoder_out: Tensor | None = None,
        encoder_padding_mask: Tensor | None = None,
        incremental_state: dict[str, dict[str, Tensor | None]] | None = None,
        *,
        self_attn_mask: Tensor | None = None,
        self_attn_padding_mask: Tensor | None = None,
        need_attn: bool = False,
        need_head_weights: bool = False,
        tokens: TokenInfo,
        memo: RoutingMemo | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Run attention and the experts over all positions.

        Args:
            x: float (S, B, D).
            encoder_out: unused, as are the encoder mask and the attention-weight switches; stock passes them.
            encoder_padding_mask: see above.
            incremental_state: keys and values of earlier tokens.
            self_attn_mask: float (S, S), added to attention scores.
            self_attn_padding_mask: bool (B, S), True = padding.
            need_attn: see above.
            need_head_weights: see above.
            tokens: what the router needs to know of the tokens, in batch-major order.
            memo: routing of an earlier pass over the same input.

        Returns:
            output (S, B, D), two Nones as stock's layer, then the three tensors of ``MoEAux``.
        """
        x = self._attend(x, incremental_state, self_attn_mask, self_attn_padding_mask)
        residual = x
        if self.normalize_before:
            x = self.final_layer_norm(x)
        seq_len, batch, dim = x.shape
        x_TD = x.transpose(0, 1).reshape(-1, dim)  # batch-major: a sequence's tokens queue together
        y_TD, aux = self.moe_layer(x_TD, tokens=tokens, memo=memo)
        x = y_TD.view(batch, seq_len, dim).transpose(0, 1)
        if self.w_resid is not None:
            residual = torch.mul(self.w_resid, residual)
        x = self.residual_connection(x, residual)
        if not self.normalize_before:
            x = self.final_layer_norm(x)
        return x, None, None, aux.losses, aux.histogram_34E, aux.measures_4

    def _attend(
        self,
        x: Tensor,
        incremental_state: dict[str, dict[str, Tensor | None]] | None,
        mask: Tensor | None,
        padding_mask: Tensor | None,
    ) -> Tensor:
        residual = x
        if self.normalize_before:
            x = self.self_attn_layer_norm(x)
        x, _ = self.self_attn(
            query=x,
            key=x,
            value=x,
            key_padding_mask=padding_mask,
            incremental_state=incremental_state,
            need_weights=False,
            attn_mask=mask,
        )
        if self.c_attn is not None:  # NormFormer's scale per head
            seq_len, batch, _ = x.shape
            x = (x.view(seq_len, batch, self.nh, -1) * self.c_attn.view(-1, 1)).reshape(seq_len, batch, -1)
        if self.attn_ln is not None:
            x = self.attn_ln(x)
        x = self.residual_connection(self.dropout_module(x), residual)
        return x if self.normalize_before else self.self_attn_layer_norm(x)


def expert_activation(activation: Any) -> Any:
    """Choose the function of torch's that experts compute for an activation of fairseq's: the same.

    fairseq's gelu is torch's with a conversion to float32 inside, which torch's own kernel makes as well; the
    experts know the derivative of torch's.
    """
    return F.gelu if activation is gelu else activation


def build_moe_layer(
    moe: MoEConfig,
    mesh: ParallelMesh,
    *,
    model_dim: int,
    hidden_dim: int,
    activation: Any,
    activation_dropout: float,
    dropout: float,
    init_std: float | None = None,
    gated_bias: bool = False,
) -> MoELayer:
    """Build router, this rank's experts (wrapped by FSDP over their replicas where fairseq wraps) and dispatcher."""
    router = _build_router(moe, mesh, model_dim)
    local_ids = mesh.layout.local_ids(mesh.rank)
    part = mesh.ranks.coordinate(mesh.rank, "expert_tensor"), mesh.ranks.expert_tensor
    placements = expert_placements(is_gated=is_gated(activation), is_cut=part[1] > 1)
    experts = Experts(
        num_local_experts=len(local_ids),
        first_expert_id=local_ids[0],
        model_dim=model_dim,
        hidden_dim=hidden_dim,
        activation=activation,
        activation_dropout=activation_dropout,
        dropout=dropout if part[1] == 1 else 0.0,
        # Drawn from the common generator: the same on every rank, whatever the number of ranks.
        seed=int(torch.randint(1_000_000, (1,), device="cpu")),
        recompute="experts" in moe.recompute_modules,
        init_std=init_std,
        fp8=moe.fp8,
        marks={name: marks_of(placement) for name, placement in placements.items()},
        gated_bias=gated_bias,
        part=part,
    )
    experts = _wrapped(experts, mesh)
    shared = None
    if moe.megatron.moe_shared_expert_intermediate_size is not None:
        shared = SharedExperts(
            model_dim=model_dim,
            hidden_dim=moe.megatron.moe_shared_expert_intermediate_size,
            activation=activation,
            gated_bias=gated_bias,
            gated=moe.megatron.moe_shared_expert_gate,
            activation_dropout=activation_dropout,
            dropout=dropout,
            recompute="shared_experts" in moe.recompute_modules,
        )
    exchange = NoExchange(mesh.exchange().size) if moe.dummy_a2a else mesh.exchange()
    timed = TimedExchange(exchange) if moe.record_a2a_perf_stats else None
    return MoELayer(
        router=router,
        experts=experts,
        shared_experts=shared,
        dispatcher=_build_dispatcher(moe, mesh, timed or exchange),
        exchange_times=None if timed is None else timed.times,
        recompute="moe" in moe.recompute_modules,
        dropout=dropout if part[1] > 1 else 0.0,
    )


def _wrapped(experts: Experts, mesh: ParallelMesh) -> Any:
    # In a single process the wrapper takes the model's own group, which has one rank.
    replicas = mesh.expert_shards
    groups = {} if replicas is None else {"process_group": replicas, "process_group_reduce_scatter": replicas}
    wrapped = fsdp_wrap(experts, **groups)
    if not isinstance(wrapped, Experts):  # flattening has lost the marks
        place(wrapped.parameters(), EXPERT)
    return wrapped


def _build_router(moe: MoEConfig, mesh: ParallelMesh, model_dim: int) -> Router:
    return Router(
        model_dim=model_dim,
        num_experts=moe.num_experts,
        config=moe.router_config(),
        scorer=moe.scorer_config(),
        balance=moe.bias_config(),
        # Routers of other stages are other ones.
        sum_over_ranks=None if mesh.stage is None else mesh.sum_over_stage,
        shards=shards_of(mesh),
    )


def _build_dispatcher(moe: MoEConfig, mesh: ParallelMesh, exchange: Exchange) -> Dispatcher:
    if moe.megatron.dispatcher == "allgather":
        first_expert_id = mesh.layout.local_ids(mesh.rank)[0]
        return AllGatherDispatcher(exchange, first_expert_id=first_expert_id, parts=mesh.ranks.expert_tensor)
    plan = plan_padded if moe.megatron.dispatcher == "padded" else plan_kept
    if exchange.size == 1:
        return LocalDispatcher(plan=plan)
    return AllToAllDispatcher(exchange, plan=plan, parts=mesh.ranks.expert_tensor)
