"""Hold the layers of one stage of a pipeline, and what comes before the first and after the last of them.

Every layer is built whole on every rank, so that initial weights do not depend on the layout, and dropped at once where
it is another stage's. Names keep the numbers of the whole model's layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from fairseq_moe.distributed import ParallelMesh, gather_values
from fairseq_moe.models.sizes import ModelSize
from fairseq_moe.parallel.placement import place, placement_of
from fairseq_moe.parallel.stages import StageLayout

if TYPE_CHECKING:  # which builds this
    from fairseq_moe.models.decoder import MoEDecoder

__all__ = ["Stage"]

_FIRST = ("embed_positions", "layernorm_embedding", "project_in_dim")
_LAST = ("layer_norm", "project_out_dim", "output_projection")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Say what one rank of a pipeline holds.

    Args:
        layout: which layers each pipeline rank holds.
        mesh: of the run; None: one rank has all.
    """

    layout: StageLayout
    mesh: ParallelMesh | None = None

    @property
    def index(self) -> int:
        """Number of this rank along the pipeline: p."""
        return 0 if self.mesh is None else self.mesh.pipe_index

    @property
    def is_piped(self) -> bool:
        """Tell whether other ranks hold other layers."""
        return self.layout.pipe > 1

    @property
    def is_first(self) -> bool:
        """Tell whether this rank embeds words."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Tell whether this rank scores words."""
        return self.index == self.layout.pipe - 1

    @property
    def chunks(self) -> list[range]:
        """List the layers of each of this rank's virtual stages, in the order in which a token meets them."""
        return [self.layout.layers_of(self.index, virtual) for virtual in range(self.layout.virtual)]

    def has_layer(self, index: int) -> bool:
        """Tell whether a decoder layer is this rank's."""
        return any(index in chunk for chunk in self.chunks)

    def drop_others(self, decoder: "MoEDecoder") -> None:
        """Drop what the first or the last stage alone needs from a decoder whose layers are built, in place.

        Words are needed at both ends where they are tied, or where blocks that guess further embed the next words.
        """
        if not self.is_piped:
            return
        are_at_both_ends = decoder.share_input_output_embed or decoder.blocks.mtp_layers > 0
        for names, has in ((_FIRST, self.is_first), (_LAST, self.is_last)):
            for name in names:
                if not has:
                    setattr(decoder, name, None)
        if not self.is_last and hasattr(decoder, "mtp"):
            del decoder.mtp
        if not (self.is_first or (self.is_last and are_at_both_ends)):
            decoder.embed_tokens = None
        elif are_at_both_ends:
            weight = decoder.embed_tokens.weight
            place([weight], replace(placement_of(weight), is_at_both_ends=True))

    def sums(self, numbers: Sequence[int]) -> list[int]:
        """Add up each of the numbers over all stages; collective over the pipeline."""
        if not self.is_piped or self.mesh is None:
            return list(numbers)
        return [
            sum(column) for column in zip(*gather_values(list(numbers), group=self.mesh.pipe), strict=True)
        ]

    def total(self, own: ModelSize) -> ModelSize:
        """Add up the sizes of all stages; collective over the pipeline."""
        names = [entry.name for entry in fields(ModelSize)]
        sums = self.sums([getattr(own, name) for name in names])
        return ModelSize(**dict(zip(names, sums, strict=True)))
