"""The transformer decoder with experts: stock fairseq's decoder, whose MoE positions hold an ``MoELayer``.

Stock's decoder loop passes each layer a fixed set of arguments and keeps the first two of its results. The
decoder here talks to its MoE layers past that loop, with forward hooks that live for one forward pass: a
pre-hook hands in the routing mode and padding, a hook takes out the auxiliary tensors. The hooks sit outside
activation checkpointing and FSDP wrappers, so the balance loss is a real output of the wrapped layer.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from fairseq.distributed import fsdp_wrap
from fairseq.models.transformer import TransformerConfig, TransformerDecoder
from fairseq.modules import transformer_layer
from fairseq.modules.checkpoint_activations import _checkpointed_forward
from torch import Tensor, nn

from fairseq_moe.config import MoEConfig
from fairseq_moe.distributed import ParallelMesh, parallel_mesh
from fairseq_moe.modules import Dispatcher, Experts, MoEAux, MoELayer, Router, RouterMode
from fairseq_moe.modules.moe_layer import RoutingMemo

__all__ = ["MoEDecoder", "MoEDecoderLayer"]


class MoEDecoder(TransformerDecoder):
    """Decoder of a language model in which every ``moe_freq``-th layer has experts.

    ``forward`` returns stock's pair; the dictionary gains ``l_aux`` (the branch's name: one balance loss per
    layer, None for a dense one) and ``moe_aux`` (one ``MoEAux`` per layer, None for a dense one).
    """

    def __init__(
        self, args: Any, dictionary: Any, embed_tokens: nn.Module, no_encoder_attn: bool = False
    ) -> None:
        self.moe = MoEConfig.from_args(args)
        self.mesh = parallel_mesh(self.moe.moe_expert_count) if self.moe.enabled else None
        self._num_built = 0
        super().__init__(args, dictionary, embed_tokens, no_encoder_attn=no_encoder_attn)

    def __deepcopy__(self, memo: dict[int, Any]) -> "MoEDecoder":
        mesh, self.mesh = self.mesh, None  # process groups cannot be copied; the copy talks to the same ranks
        try:
            copy = type(self).__new__(type(self))
            memo[id(self)] = copy
            copy.__dict__.update(deepcopy(self.__dict__, memo))
        finally:
            self.mesh = mesh
        copy.mesh = mesh
        return copy

    def build_decoder_layer(self, args: Any, no_encoder_attn: bool = False) -> nn.Module:
        """Build the next layer; stock calls this once per layer, in order, without an index."""
        index = self._num_built
        self._num_built += 1
        if not self.moe.is_moe_layer(index):
            return super().build_decoder_layer(args, no_encoder_attn)
        cfg = TransformerConfig.from_namespace(args)
        if self.moe.is_pseudo_moe:
            cfg = deepcopy(cfg)
            cfg.decoder.ffn_embed_dim = self.moe.alternate_decoder_ffn_embed_dim
            return super(TransformerDecoder, self).build_decoder_layer(cfg, no_encoder_attn)
        assert self.mesh is not None
        layer: nn.Module = MoEDecoderLayer(cfg, self.moe, self.mesh)
        min_params = cfg.min_params_to_wrap
        if cfg.checkpoint_activations:
            layer.precheckpoint_forward = layer.forward  # where stock's unwrap_checkpoint looks
            layer.forward = functools.partial(_checkpoint_keeping_routes, layer.forward)  # type: ignore[method-assign]
            min_params = 0
        return fsdp_wrap(layer, min_num_params=min_params)

    def forward(
        self, prev_output_tokens: Tensor, *args: Any, all_padding: bool = False, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Stock's forward.

        Args:
            prev_output_tokens: int64 (B, S).
            args: as stock.
            all_padding: the batch only keeps this rank in step with the others: its tokens take no capacity
                and enter no statistic.
            kwargs: as stock.
        """
        incremental_state = kwargs.get("incremental_state", args[1] if len(args) > 1 else None)
        if incremental_state is not None:
            mode, tokens = RouterMode.GENERATE, prev_output_tokens[:, -1:]
        else:
            mode, tokens = RouterMode.TRAIN if self.training else RouterMode.EVAL, prev_output_tokens
        padding_T = None
        if all_padding:
            padding_T = torch.ones_like(tokens, dtype=torch.bool).reshape(-1)
        elif self.moe.use_moe_pad_mask:
            padding_T = tokens.eq(self.padding_idx).reshape(-1)
        with self._talk_to_moe_layers(mode, padding_T) as auxes:
            x, extra = super().forward(prev_output_tokens, *args, **kwargs)
        extra["moe_aux"] = auxes
        extra["l_aux"] = [None if aux is None else aux.balance_loss for aux in auxes]
        return x, extra

    @contextmanager
    def _talk_to_moe_layers(
        self, mode: RouterMode, padding_T: Tensor | None
    ) -> Iterator[list[MoEAux | None]]:
        auxes: list[MoEAux | None] = [None] * len(self.layers)

        def hand_in(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "mode": mode, "padding_T": padding_T}

        def take_out(module: nn.Module, args: Any, output: Any, *, index: int) -> Any:
            x, attn, none, *aux = output
            auxes[index] = MoEAux(balance_loss=aux[0], stats=aux[1], load_2E=aux[2])
            return x, attn, none

        handles = []
        for index, layer in enumerate(self.layers):
            if self.moe.enabled and self.moe.is_moe_layer(index):
                handles.append(layer.register_forward_pre_hook(hand_in, with_kwargs=True))
                handles.append(layer.register_forward_hook(functools.partial(take_out, index=index)))
        try:
            yield auxes
        finally:
            for handle in handles:
                handle.remove()


class MoEDecoderLayer(transformer_layer.TransformerDecoderLayerBase):
    """Self-attention, then experts in the place of the feed-forward network.

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
            hidden_dim=moe.moe_expert_ffn_dim or cfg.decoder.ffn_embed_dim,
            activation=self.activation_fn,
            activation_dropout=self.activation_dropout_module.p,
            dropout=self.dropout_module.p,
        )

    def build_fc1(self, *args: Any) -> None:
        """No dense feed-forward network: it would only take memory."""

    def build_fc2(self, *args: Any) -> None:
        """No dense feed-forward network: it would only take memory."""

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
        mode: RouterMode,
        padding_T: Tensor | None = None,
        memo: RoutingMemo | None = None,
    ) -> tuple[Tensor | None, ...]:
        """One layer.

        Args:
            x: float (S, B, D).
            encoder_out: unused, as are the encoder mask and the attention-weight switches; stock passes them.
            encoder_padding_mask: see above.
            incremental_state: keys and values of earlier tokens.
            self_attn_mask: float (S, S), added to attention scores.
            self_attn_padding_mask: bool (B, S), True = padding.
            need_attn: see above.
            need_head_weights: see above.
            mode: training, evaluation or generation.
            padding_T: bool (B * S,), tokens that the router leaves out.
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
        y_TD, aux = self.moe_layer(x_TD, mode=mode, padding_T=padding_T, memo=memo)
        x = y_TD.view(batch, seq_len, dim).transpose(0, 1)
        if self.w_resid is not None:
            residual = torch.mul(self.w_resid, residual)
        x = self.residual_connection(x, residual)
        if not self.normalize_before:
            x = self.final_layer_norm(x)
        return x, None, None, aux.balance_loss, aux.stats, aux.load_2E

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


def build_moe_layer(
    moe: MoEConfig,
    mesh: ParallelMesh,
    *,
    model_dim: int,
    hidden_dim: int,
    activation: Any,
    activation_dropout: float,
    dropout: float,
) -> MoELayer:
    """Router, this rank's experts (wrapped by FSDP over their replicas where fairseq wraps), dispatcher."""
    router = Router(model_dim=model_dim, num_experts=moe.moe_expert_count, config=moe.router_config())
    local_ids = mesh.layout.local_ids(mesh.rank)
    experts = Experts(
        num_local_experts=len(local_ids),
        first_expert_id=local_ids[0],
        model_dim=model_dim,
        hidden_dim=hidden_dim,
        activation=activation,
        activation_dropout=activation_dropout,
        dropout=dropout,
        # Drawn from the common generator: the same on every rank, whatever the number of ranks.
        seed=int(torch.randint(1_000_000, (1,), device="cpu")),
    )
    # In a single process the wrapper takes the model's own group, which has one rank.
    replicas = mesh.replica_group
    groups = {} if replicas is None else {"process_group": replicas, "process_group_reduce_scatter": replicas}
    experts = fsdp_wrap(experts, **groups)
    for parameter in experts.parameters():  # flattening has lost the mark
        parameter.expert = True
    return MoELayer(
        router=router,
        experts=experts,
        dispatcher=Dispatcher(mesh.exchange(), num_experts=moe.moe_expert_count, skip_exchange=moe.dummy_a2a),
        record_exchange_times=moe.record_a2a_perf_stats,
    )


def _checkpoint_keeping_routes(forward: Any, *args: Any, **kwargs: Any) -> Any:
    """fairseq's activation checkpointing; the recomputation obeys the first pass's routing."""
    return _checkpointed_forward(functools.partial(forward, memo=RoutingMemo()), False, *args, **kwargs)
