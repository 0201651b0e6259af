"""Build the transformer decoder with experts: stock fairseq's decoder, whose MoE positions hold an ``MoELayer``.

Stock's decoder loop passes each layer a fixed set of arguments and keeps the first two of its results. The
decoder here talks to its MoE layers past that loop, with forward hooks that live for one forward pass: a
pre-hook hands in the routing mode and padding, a hook takes out the auxiliary tensors. The hooks sit outside
activation checkpointing and FSDP wrappers, so the balance loss is a real output of the wrapped layer.
"""

import copy
import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from fairseq.distributed import fsdp_wrap
from fairseq.models.transformer import TransformerConfig, TransformerDecoder
from fairseq.modules.checkpoint_activations import _checkpointed_forward
from torch import Tensor, nn

from fairseq_moe.distributed import ParallelMesh, parallel_mesh, rank, world_size
from fairseq_moe.distributed.sequence import shards_of
from fairseq_moe.expert_load.watch import LoadWatch
from fairseq_moe.flags.blocks import BlocksConfig
from fairseq_moe.flags.moe import MoEConfig
from fairseq_moe.models.block_layer import (
    BlocksDecoderLayer,
    build_blocks_layer,
    build_norm,
    ffn_activation,
    init_weights,
)
from fairseq_moe.models.cutting import cut_layer, cut_vocabulary
from fairseq_moe.models.decoder_layer import MoEDecoderLayer, build_moe_layer
from fairseq_moe.models.mtp import MTPBlock
from fairseq_moe.models.sharded_decoder import ShardedDecoder
from fairseq_moe.models.sizes import ModelSize
from fairseq_moe.models.stage import Stage
from fairseq_moe.models.stage_values import SideTensor, StageInput, StageOutput
from fairseq_moe.models.stock_layer import build_stock_layer_part
from fairseq_moe.modules import MoEAux, MoELayer, Router, RouterMode, TokenInfo
from fairseq_moe.modules.blocks.rope import Rotary
from fairseq_moe.modules.moe_layer import RoutingMemo
from fairseq_moe.parallel.stages import StageLayout

__all__ = ["MoEDecoder"]

logger = logging.getLogger(__name__)


class MoEDecoder(TransformerDecoder):
    """Decode a language, with experts in some or all layers, made of stock's blocks or of our own.

    ``forward`` returns stock's pair; the dictionary gains ``l_aux`` (the branch's name: one balance loss per
    layer, None for a dense one), ``moe_aux`` (one ``MoEAux`` per layer, None for a dense one) and, in training with
    --mtp-loss-weight, ``mtp_logits`` (float (B, S - 1 - k, V) of block k, whose position t guesses the target of
    position t + 1 + k), ``mtp_aux`` and ``mtp_loss_weight``.
    """

    size: ModelSize  # of the whole model, counted when it was built
    layer_norm: nn.Module | None  # stock's, or one of our blocks

    def __init__(
        self, args: Any, dictionary: Any, embed_tokens: nn.Module, no_encoder_attn: bool = False
    ) -> None:
        self.moe = MoEConfig.from_args(args)
        self.blocks = BlocksConfig.from_args(args)
        self.mesh = self._build_mesh() if self.moe.enabled else None
        self.shards = shards_of(self.mesh)
        self.stage = self._find_stage()
        self._num_built = 0
        if self.blocks.enabled:
            args = self._prepare_blocks(args)
        super().__init__(args, dictionary, embed_tokens, no_encoder_attn=no_encoder_attn)
        if self.blocks.enabled:
            self._finish_blocks(TransformerConfig.from_namespace(args))
        if self.is_sharded and self.mesh is not None:
            cut_vocabulary(self.embed_tokens, self.output_projection, self.mesh)
        self.stage.drop_others(self)
        # Which layers have experts, from 0: read from the flags once, not in each forward pass.
        indices = range(self.num_layers) if self.moe.enabled else ()
        self.moe_layers = [index for index in indices if self.moe.is_moe_layer(index)]
        self.side = SideTensor(layers=self.moe_layers, num_experts=self.moe.num_experts)
        self.load_watch = LoadWatch(layers=self.moe_layers, top_k=self.moe.top_k)
        # As the flags say; a run that goes on keeps what it began with (``stock.checkpoint.padding_mask``).
        self.masks_padding = self.moe.masks_padding
        self._has_warned_of_padding = False

    def _prepare_blocks(self, args: Any) -> Any:
        """Tell stock's constructor what it must know of our blocks."""
        args = copy.copy(args)
        args.decoder_normalize_before = True
        if self.blocks.position_embedding is not None:
            args.no_token_positional_embeddings = True
        rotary, self.rotary = self.blocks.rotary_config(), None
        if rotary is not None:
            sizes = {"model_dim": args.decoder_embed_dim, "num_heads": args.decoder_attention_heads}
            self.rotary = Rotary(rotary, self.blocks.rotary_head_dim(**sizes))
        return args

    def _finish_blocks(self, cfg: TransformerConfig) -> None:
        if self.blocks.embedding_multiplier is not None:
            self.embed_scale *= self.blocks.embedding_multiplier
        if self.layer_norm is not None:
            self.layer_norm = build_norm(self.blocks, self.embed_dim)
        for module in (self.embed_tokens, self.output_projection, self.embed_positions):
            if module is not None:
                init_weights(module, self.blocks.std)
        if self.padding_idx < self.embed_tokens.num_embeddings:
            with torch.no_grad():
                self.embed_tokens.weight[self.padding_idx].zero_()
        if self.blocks.mtp_layers:
            self.mtp = nn.ModuleList(self._build_mtp(cfg) for _ in range(self.blocks.mtp_layers))

    def _build_mtp(self, cfg: TransformerConfig) -> nn.Module:
        layer = self._wrapped(self._build_blocks_layer(cfg, has_experts=self.moe.enabled, window=None), cfg)
        block = MTPBlock(self.blocks, self.embed_dim, layer)
        if self.blocks.mtp_loss_weight > 0:
            return block
        # Without a loss they get no gradient; what has none is not the optimizer's. Wrapped apart, because FSDP shards
        # what is frozen and what is not in different flat parameters.
        return fsdp_wrap(block.requires_grad_(False))

    def _build_mesh(self) -> ParallelMesh:
        # The size of a group is a property of the run: a model that is loaded elsewhere may not fit it.
        if world_size() == 1:
            return parallel_mesh(self.moe.num_experts)
        return parallel_mesh(self.moe.num_experts, **self.moe.axes._asdict())

    def _find_stage(self) -> Stage:
        num_layers = self.moe.decoder_layers
        if self.mesh is None or self.mesh.ranks.pipe == 1:
            return Stage(layout=StageLayout(num_layers=num_layers, pipe=1, virtual=1))
        return Stage(layout=self.moe.parallel.stages(num_layers), mesh=self.mesh)

    @property
    def is_sharded(self) -> bool:
        """Tell whether other ranks compute other parts of this rank's micro-batches."""
        return self.mesh is not None and self.mesh.num_batch_shards > 1

    def build_decoder_layer(self, args: Any, no_encoder_attn: bool = False) -> nn.Module | None:
        """Build the next layer; stock calls this once per layer, in order, without an index.

        A layer of another stage of the pipeline is built, so that random numbers are drawn, and dropped.
        """
        index = self._num_built
        self._num_built += 1
        layer = self._build_layer(args, no_encoder_attn, index)
        return layer if self.stage.has_layer(index) else None

    def _build_layer(self, args: Any, no_encoder_attn: bool, index: int) -> nn.Module:
        cfg = TransformerConfig.from_namespace(args)
        if self.blocks.enabled:
            has_experts = self.moe.enabled and self.moe.is_moe_layer(index)
            window = self.blocks.windows(self.moe.decoder_layers)[index]
            return self._wrapped(self._build_blocks_layer(cfg, has_experts=has_experts, window=window), cfg)
        if self.is_sharded:
            assert self.mesh is not None
            moe = self.moe if self.moe.is_moe_layer(index) else None
            return self._wrapped(build_stock_layer_part(cfg, moe, self.mesh, self.shards), cfg)
        if not self.moe.is_moe_layer(index):
            return super().build_decoder_layer(args, no_encoder_attn)
        if self.moe.is_pseudo_moe:
            cfg = deepcopy(cfg)
            cfg.decoder.ffn_embed_dim = self.moe.alternate_decoder_ffn_embed_dim
            return super(TransformerDecoder, self).build_decoder_layer(cfg, no_encoder_attn)
        assert self.mesh is not None
        return self._wrapped(MoEDecoderLayer(cfg, self.moe, self.mesh), cfg)

    def _build_blocks_layer(
        self, cfg: TransformerConfig, *, has_experts: bool, window: int | None
    ) -> BlocksDecoderLayer:
        moe_layer = None
        if has_experts:
            assert self.mesh is not None
            moe_layer = build_moe_layer(
                self.moe,
                self.mesh,
                model_dim=cfg.decoder.embed_dim,
                hidden_dim=self.moe.expert_dim or cfg.decoder.ffn_embed_dim,
                activation=ffn_activation(cfg, self.blocks),
                activation_dropout=float(cfg.activation_dropout or cfg.relu_dropout or 0),
                dropout=cfg.dropout,
                init_std=self.blocks.std,
                gated_bias=self.blocks.gated_ffn_bias,
            )
        layer = build_blocks_layer(
            cfg, self.blocks, rotary=self.rotary, moe_layer=moe_layer, shards=self.shards, window=window
        )
        return cut_layer(layer, self.mesh) if self.is_sharded and self.mesh is not None else layer

    @staticmethod
    def _wrapped(layer: nn.Module, cfg: TransformerConfig) -> nn.Module:
        """Wrap a layer in activation checkpointing and FSDP, as stock wraps its own."""
        min_params = cfg.min_params_to_wrap
        if cfg.checkpoint_activations:
            # Where stock's unwrap_checkpoint looks.
            layer.precheckpoint_forward = layer.forward  # type: ignore[assignment]
            layer.forward = functools.partial(_checkpoint_keeping_routes, layer.forward)  # type: ignore[method-assign]
            min_params = 0
        return fsdp_wrap(layer, min_num_params=min_params)

    def freeze(self, modules: frozenset[str]) -> None:
        """Stop training ``routers`` or ``experts`` (not the shared ones) of every MoE layer."""
        for layer in self.modules():
            if isinstance(layer, MoELayer):
                for name, part in (("routers", layer.router), ("experts", layer.experts)):
                    if name in modules:
                        part.requires_grad_(False)

    def routers(self) -> list[Router]:
        """List the routers of the MoE layers, in order."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Any = None,
        incremental_state: dict[str, Any] | None = None,
        features_only: bool = False,
        *,
        all_padding: bool = False,
        stage_input: StageInput | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]] | StageOutput:
        """Compute logits as stock does, with what the experts say besides.

        Args:
            prev_output_tokens: int64 (B, S).
            encoder_out: as stock, None.
            incremental_state: as stock.
            features_only: as stock.
            all_padding: the batch only keeps this rank in step with the others: its tokens take no capacity
                and enter no statistic.
            stage_input: what the stage of a pipeline before this one has computed; None: this is the first.
            kwargs: as stock.

        Returns:
            stock's pair; of a stage that another one follows, what that one takes.
        """
        if incremental_state is not None:
            mode, ids = RouterMode.GENERATE, prev_output_tokens[:, -1:]
        else:
            mode, ids = RouterMode.TRAIN if self.training else RouterMode.EVAL, prev_output_tokens
        padding_T = self._padding_of(ids, all_padding=all_padding)
        tokens = TokenInfo(mode=mode, padding_T=padding_T, ids_T=ids.reshape(-1), num_sequences=len(ids))
        guesses_further = self.blocks.mtp_loss_weight > 0 and mode is RouterMode.TRAIN and not features_only
        score: Callable[[Tensor], Tensor] = self.output_layer
        extra: dict[str, Any]
        if self.is_sharded or self.stage.is_piped:
            assert incremental_state is None and not features_only
            own = ShardedDecoder(self, prev_output_tokens.shape[1])
            found = own.forward(prev_output_tokens, tokens, stage_input or StageInput())
            if isinstance(found, StageOutput):
                return found
            (x, auxes), score, extra = found, own.score, {"attn": [None]}
            if self.is_sharded:
                extra["sharded_output"] = own.output
        else:
            with self._talk_to_moe_layers(tokens) as auxes:
                x, extra = super().forward(
                    prev_output_tokens, encoder_out, incremental_state, features_only=True, **kwargs
                )
        if guesses_further:
            extra |= self._guess_further(x, prev_output_tokens, padding_T)
        if not features_only:
            x = score(x)
        extra["moe_aux"] = auxes
        extra["moe_loss_coefficients"] = self.moe.loss_coefficients
        extra["moe_per_layer_logging"] = self.moe.moe_per_layer_logging
        extra["moe_load_watch"] = self.load_watch
        extra["l_aux"] = [None if aux is None else aux.balance_loss for aux in auxes]
        return x, extra

    def _padding_of(self, ids_BS: Tensor, *, all_padding: bool) -> Tensor | None:
        """Mark the tokens that are not to be routed: bool (B * S,); None where all are."""
        if all_padding:
            return torch.ones_like(ids_BS, dtype=torch.bool).reshape(-1)
        if self.masks_padding:
            return ids_BS.eq(self.padding_idx).reshape(-1)
        return None

    def warn_of_padding(self, tokens: TokenInfo) -> None:
        """Say once that padding is routed like words, where nobody has decided about it."""
        is_decided = tokens.padding_T is not None or self.moe.use_moe_pad_mask is not None
        if is_decided or tokens.mode is not RouterMode.TRAIN or self._has_warned_of_padding:
            return
        self._has_warned_of_padding = True
        if rank() == 0:
            logger.warning(
                "batches are padded, and padding is routed like words: it takes capacity at the experts and enters "
                "the balance loss, as in fairseq's moe branch; pass --use-moe-pad-mask to leave it out, or "
                "--use-moe-pad-mask false to silence this."
            )

    def _guess_further(self, hidden_BSD: Tensor, ids_BS: Tensor, padding_T: Tensor | None) -> dict[str, Any]:
        """Compute the logits of the blocks of multi-token prediction, and what their experts say."""
        logits, auxes = [], []
        left_out_BS = None if padding_T is None else padding_T.view_as(ids_BS)
        for block in self.mtp:
            # Each block lacks one more token to look at, at the end. Rotary positions are relative.
            hidden_BSD, ids_BS = hidden_BSD[:, :-1], ids_BS[:, 1:]
            left_out_BS = None if left_out_BS is None else left_out_BS[:, 1:]
            embedded_BSD = self.dropout_module(self.embed_scale * self.embed_tokens(ids_BS))
            padding_BS = ids_BS.eq(self.padding_idx)
            hidden_BSD, aux = block(
                hidden_BSD,
                embedded_BSD,
                future_mask=self.buffered_future_mask(embedded_BSD.transpose(0, 1)),
                padding_BS=padding_BS if padding_BS.any() else None,
                tokens=TokenInfo(
                    mode=RouterMode.TRAIN,
                    padding_T=None if left_out_BS is None else left_out_BS.reshape(-1),
                    ids_T=ids_BS.reshape(-1),
                    num_sequences=len(ids_BS),
                ),
            )
            logits.append(self.output_layer(hidden_BSD))
            auxes.append(aux)
        return {"mtp_logits": logits, "mtp_aux": auxes, "mtp_loss_weight": self.blocks.mtp_loss_weight}

    def output_layer(self, features: Tensor) -> Tensor:
        """Score words as stock does: (B, S, D) -> (B, S, V)."""
        logits: Tensor = super().output_layer(self.scaled(features))
        return logits

    def scaled(self, features: Tensor) -> Tensor:
        """Divide what logits are made of by --logits-scaling, and so the logits, without a second copy of them."""
        scaling = self.blocks.logits_scaling
        return features if scaling is None else features / scaling

    def buffered_future_mask(self, tensor: Tensor) -> Tensor:
        """Make the causal mask as stock does; our own layers ask only whether there is one."""
        has_own_layers = self.blocks.enabled or self.is_sharded
        return tensor.new_empty(0) if has_own_layers else super().buffered_future_mask(tensor)

    def upgrade_state_dict_named(self, state_dict: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        """Upgrade old tensors as stock does; our own blocks have none, and converted models name no version."""
        if self.blocks.enabled:
            state_dict.setdefault(f"{name}.version", torch.tensor([3.0]))
        upgraded: dict[str, Tensor] = super().upgrade_state_dict_named(state_dict, name)
        if self.output_projection is None:  # of another stage; stock makes it of tied words
            upgraded.pop(f"{name}.output_projection.weight", None)
        return upgraded

    def get_normalized_probs(
        self, net_output: tuple[Tensor, Any], log_probs: bool, sample: dict[str, Any] | None = None
    ) -> Tensor:
        """Normalise logits as stock does; outside training, padding beyond the vocabulary gets a column and no chance.

        Stock's generators and scorers look it up by its number.
        """
        found: Tensor = super().get_normalized_probs(net_output, log_probs, sample)
        num_missing = self.padding_idx + 1 - found.shape[-1]
        if self.training or num_missing <= 0:
            return found
        return F.pad(found, (0, num_missing), value=float("-inf") if log_probs else 0.0)

    @contextmanager
    def _talk_to_moe_layers(self, tokens: TokenInfo) -> Iterator[list[MoEAux | None]]:
        auxes: list[MoEAux | None] = [None] * len(self.layers)

        def hand_in(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if kwargs["self_attn_padding_mask"] is not None:  # stock has waited for the device to know
                self.warn_of_padding(tokens)
            return args, {**kwargs, "tokens": tokens}

        def take_out(module: nn.Module, args: Any, output: Any, *, index: int) -> Any:
            x, attn, none, *aux = output
            auxes[index] = MoEAux(losses=aux[0], histogram_34E=aux[1], measures_4=aux[2])
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
    """Run fairseq's activation checkpointing, whose second pass obeys the routing decisions of the first."""
    return _checkpointed_forward(functools.partial(forward, memo=RoutingMemo()), False, *args, **kwargs)
