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
from fairseq.modules.checkpoint_activations import _checkpointed_forward
from torch import Tensor, nn

from fairseq_moe.config import MoEConfig
from fairseq_moe.distributed import ParallelMesh, parallel_mesh, world_size
from fairseq_moe.load_watch import LoadWatch
from fairseq_moe.models.decoder_layer import MoEDecoderLayer
from fairseq_moe.modules import MoEAux, Router, RouterMode, TokenInfo
from fairseq_moe.modules.moe_layer import RoutingMemo

__all__ = ["MoEDecoder"]


class MoEDecoder(TransformerDecoder):
    """Decoder of a language model in which every ``moe_freq``-th layer has experts.

    ``forward`` returns stock's pair; the dictionary gains ``l_aux`` (the branch's name: one balance loss per
    layer, None for a dense one) and ``moe_aux`` (one ``MoEAux`` per layer, None for a dense one).
    """

    def __init__(
        self, args: Any, dictionary: Any, embed_tokens: nn.Module, no_encoder_attn: bool = False
    ) -> None:
        self.moe = MoEConfig.from_args(args)
        self.mesh = self._build_mesh() if self.moe.enabled else None
        self._num_built = 0
        super().__init__(args, dictionary, embed_tokens, no_encoder_attn=no_encoder_attn)
        # Which layers have experts, from 0: read from the flags once, not in each forward pass.
        indices = range(self.num_layers) if self.moe.enabled else ()
        self.moe_layers = [index for index in indices if self.moe.is_moe_layer(index)]
        self.load_watch = LoadWatch(layers=self.moe_layers, top_k=self.moe.top_k)

    def _build_mesh(self) -> ParallelMesh:
        # The size of a group is a property of the run: a model that is loaded elsewhere may not fit it.
        ep_size = None if world_size() == 1 else self.moe.megatron.expert_model_parallel_size
        return parallel_mesh(self.moe.num_experts, ep_size)

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

    def routers(self) -> list[Router]:
        """The routers of the MoE layers, in order."""
        return [module for module in self.modules() if isinstance(module, Router)]

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
            mode, ids = RouterMode.GENERATE, prev_output_tokens[:, -1:]
        else:
            mode, ids = RouterMode.TRAIN if self.training else RouterMode.EVAL, prev_output_tokens
        padding_T = None
        if all_padding:
            padding_T = torch.ones_like(ids, dtype=torch.bool).reshape(-1)
        elif self.moe.use_moe_pad_mask:
            padding_T = ids.eq(self.padding_idx).reshape(-1)
        tokens = TokenInfo(mode=mode, padding_T=padding_T, ids_T=ids.reshape(-1), num_sequences=len(ids))
        with self._talk_to_moe_layers(tokens) as auxes:
            x, extra = super().forward(prev_output_tokens, *args, **kwargs)
        extra["moe_aux"] = auxes
        extra["moe_loss_coefficients"] = self.moe.loss_coefficients
        extra["moe_per_layer_logging"] = self.moe.moe_per_layer_logging
        extra["moe_load_watch"] = self.load_watch
        extra["l_aux"] = [None if aux is None else aux.balance_loss for aux in auxes]
        return x, extra

    @contextmanager
    def _talk_to_moe_layers(self, tokens: TokenInfo) -> Iterator[list[MoEAux | None]]:
        auxes: list[MoEAux | None] = [None] * len(self.layers)

        def hand_in(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "tokens": tokens}

        def take_out(module: nn.Module, args: Any, output: Any, *, index: int) -> Any:
            x, attn, none, *aux = output
            auxes[index] = MoEAux(losses=aux[0], stats=aux[1], load_2E=aux[2])
            return x, attn, none

        handles = []
        for index in self.moe_layers:
            layer = self.layers[index]
            handles.append(layer.register_forward_pre_hook(hand_in, with_kwargs=True))
            handles.append(layer.register_forward_hook(functools.partial(take_out, index=index)))
        try:
            yield auxes
        finally:
            for handle in handles:
                handle.remove()


def _checkpoint_keeping_routes(forward: Any, *args: Any, **kwargs: Any) -> Any:
    """fairseq's activation checkpointing; the recomputation obeys the first pass's routing."""
    return _checkpointed_forward(functools.partial(forward, memo=RoutingMemo()), False, *args, **kwargs)
