"""Run a decoder on one of the ranks that share a micro-batch: embed, run the layers, project, each on its own part.

Stock's loop computes every position in every layer on every rank. Here a rank embeds its words of all of its context's
tokens, keeps its own tokens between blocks, runs the layers of its stage, and gives the scores of its words for its
context's positions.
"""

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.models.stage_values import StageInput, StageOutput
from fairseq_moe.modules import MoEAux, TokenInfo
from fairseq_moe.modules.parts import part_slices
from fairseq_moe.modules.shards import SequencePart, ShardedOutput
from fairseq_moe.modules.whole_aux import whole_auxes

if TYPE_CHECKING:  # which calls this
    from fairseq_moe.models.decoder import MoEDecoder

__all__ = ["ShardedDecoder"]


class ShardedDecoder:
    """Compute what one rank of several has of a decoder's output.

    Args:
        decoder: with cut parameters.
        length: S, positions of this batch's sequences.
    """

    def __init__(self, decoder: "MoEDecoder", length: int) -> None:
        self.decoder = decoder
        self.shards = decoder.shards
        self.part: SequencePart = self.shards.part_of(length)
        size = len(decoder.dictionary)
        (self.words,) = part_slices(size, index=self.shards.tensor_index, count=self.shards.tensor)

    @property
    def output(self) -> ShardedOutput:
        """Say which positions and words ``score`` scores."""
        num_words = self.words.stop - self.words.start
        return ShardedOutput(
            shards=self.shards, part=self.part, first_word=self.words.start, num_words=num_words
        )

    def forward(
        self, ids_BS: Tensor, tokens: TokenInfo, at: StageInput
    ) -> StageOutput | tuple[Tensor, list[MoEAux | None]]:
        """Compute one stage of this rank's part of a micro-batch.

        Args:
            ids_BS: int64, of whole sequences.
            tokens: of all of them.
            at: what the stage before has computed.

        Returns:
            what the next stage takes; of the last one what ``score`` takes, and what the experts of all layers say.
        """
        decoder = self.decoder
        layers = decoder.stage.chunks[at.virtual]
        is_padding = ids_BS.eq(decoder.padding_idx)
        has_padding = bool(is_padding.any())
        if has_padding:
            decoder.warn_of_padding(tokens)
        x_BSD = self.embed(ids_BS) if at.x_BSD is None else at.x_BSD
        x_BSD, auxes = self.run_layers(
            x_BSD, layers, self.own_tokens(tokens), is_padding if has_padding else None
        )
        if layers.stop < decoder.num_layers:
            return StageOutput(x_BSD=x_BSD, side=decoder.side.pack(auxes, at.side, x_BSD))
        if at.side is not None:
            auxes = decoder.side.unpack(at.side) | auxes
        listed = [auxes.get(index) for index in range(decoder.num_layers)]
        return self.finish(x_BSD), whole_auxes(listed, self.shards)

    def own_tokens(self, tokens: TokenInfo) -> TokenInfo:
        """Keep what describes this rank's own tokens: those of positions that are there."""
        part = self.part

        def own(values_T: Tensor | None) -> Tensor | None:
            if values_T is None:
                return None
            whole_BS = values_T.view(tokens.num_sequences, -1)
            return part.own(whole_BS, dim=1)[:, : part.num_present].reshape(-1)

        return TokenInfo(
            mode=tokens.mode,
            padding_T=own(tokens.padding_T),
            ids_T=own(tokens.ids_T),
            num_sequences=tokens.num_sequences,
            num_positions=part.num_present,
        )

    def embed(self, ids_BS: Tensor) -> Tensor:
        """Embed this rank's own tokens: (B, S) -> (B, S / (C T), D), as stock does each."""
        decoder, part = self.decoder, self.part
        x_BSD = self.shards.scatter_sum(
            self._own_words(part.of_context(ids_BS, dim=1, filler=decoder.padding_idx))
        )
        x_BSD = decoder.embed_scale * x_BSD
        if decoder.project_in_dim is not None:
            x_BSD = decoder.project_in_dim(x_BSD)
        if decoder.embed_positions is not None:
            # Looked up for whole sequences: stock counts positions from the ids.
            x_BSD = x_BSD + part.own(decoder.embed_positions(ids_BS), dim=1)
        if decoder.layernorm_embedding is not None:
            x_BSD = decoder.layernorm_embedding(x_BSD)
        embedded: Tensor = decoder.dropout_module(x_BSD)
        return embedded

    def _own_words(self, ids_BS: Tensor) -> Tensor:
        """Look up the words whose rows this rank has; others are zeros, as is padding that is no word.

        No gradient flows to the row of padding; it is not zero where output and input share rows.
        """
        weight: Any = self.decoder.embed_tokens.weight
        is_own = (ids_BS >= self.words.start) & (ids_BS < self.words.stop)
        rows_BSD = F.embedding(
            (ids_BS - self.words.start).masked_fill(~is_own, 0), weight, padding_idx=self._padding_row
        )
        return rows_BSD.masked_fill(~is_own.unsqueeze(-1), 0.0)

    @property
    def _padding_row(self) -> int | None:
        """Find the row of padding among this rank's, if it is there."""
        padding = self.decoder.padding_idx
        is_own = self.words.start <= padding < self.words.stop
        return padding - self.words.start if is_own else None

    def run_layers(
        self, x_BSD: Tensor, layers: range, tokens: TokenInfo, padding_BS: Tensor | None
    ) -> tuple[Tensor, dict[int, MoEAux]]:
        """Run some layers over this rank's own tokens; also what the experts of those that have any say.

        Args:
            x_BSD: float, embedded, or what earlier layers have made of it.
            layers: numbers of consecutive decoder layers.
            tokens: this rank's own.
            padding_BS: bool, True = padding, of whole sequences.
        """
        decoder, auxes = self.decoder, {}
        if padding_BS is not None:  # absent positions are later than all others, which do not see them
            padding_BS = F.pad(padding_BS, (0, self.part.padded_length - padding_BS.shape[1]), value=False)
        x = x_BSD.transpose(0, 1)
        causal = decoder.buffered_future_mask(x)
        for index in layers:
            kwargs: dict[str, Any] = {"tokens": tokens} if index in decoder.moe_layers else {}
            x, _, _, *aux = decoder.layers[index](
                x, self_attn_mask=causal, self_attn_padding_mask=padding_BS, **kwargs
            )
            if aux:
                auxes[index] = MoEAux(losses=aux[0], histogram_34E=aux[1], measures_4=aux[2])
        return x.transpose(0, 1), auxes

    def finish(self, x_BSD: Tensor) -> Tensor:
        """Apply what follows the last layer: the final norm, and a change of width."""
        decoder = self.decoder
        if decoder.layer_norm is not None:
            x_BSD = decoder.layer_norm(x_BSD)
        if decoder.project_out_dim is not None:
            x_BSD = decoder.project_out_dim(x_BSD)
        return x_BSD

    def score(self, x_BSD: Tensor) -> Tensor:
        """Score this rank's words at its context's positions: (B, S / (C T), D) -> (B, S / C, words)."""
        weight: Any = self.decoder.output_projection.weight
        return F.linear(self.shards.gather(self.decoder.scaled(x_BSD)), weight)
