"""Read a dense checkpoint of a ``transformer_lm``, and tell whether its layers could have experts."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fairseq_moe.checkpoint import MANIFEST_KEY, damage_as_sentence, load_plain
from fairseq_moe.errors import CheckpointError
from fairseq_moe.flags.moe import MoEConfig

__all__ = ["DenseModel"]

# What a layer with experts has beside its network. --scale-fc, --scale-attn and their like put more there, which stock
# leaves out when it builds a model of the flags that our checkpoints hold.
_BESIDE = frozenset({"final_layer_norm", "self_attn", "self_attn_layer_norm"})
_MAX_LISTED = 3


@dataclass(frozen=True, kw_only=True)
class DenseModel:
    """Hold the tensors and flags of a dense checkpoint that experts are made from.

    Args:
        tensors: by name, tied ones under each of theirs.
        settings: fairseq's whole configuration.
        flags: of the model.
        num_layers: of the decoder.
        model_dim: D.
        hidden_dim: of the network of every layer.
        is_gated: the networks are SwiGLU.
        has_bias: they have biases.
    """

    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    flags: dict[str, Any]
    num_layers: int
    model_dim: int
    hidden_dim: int
    is_gated: bool
    has_bias: bool

    @classmethod
    def read(cls, path: Path) -> "DenseModel":
        """Load a file of stock fairseq.

        Raises:
            CheckpointError: it is damaged, no dense model, or has layers that could not have experts.
        """
        state = load_plain(path)
        tensors, settings = state.get("model"), state.get("cfg")
        if MANIFEST_KEY in state or not isinstance(tensors, dict) or not isinstance(settings, dict):
            raise CheckpointError(f"{path} is no dense checkpoint of a transformer_lm; give one.")
        with damage_as_sentence(path):
            flags = (
                settings["model"] if isinstance(settings["model"], dict) else dict(vars(settings["model"]))
            )
            found = cls(
                tensors=tensors,
                settings=settings,
                flags=flags,
                num_layers=int(flags["decoder_layers"]),
                model_dim=int(flags["decoder_embed_dim"]),
                hidden_dim=int(flags["decoder_ffn_embed_dim"]),
                is_gated=bool(flags.get("gated_ffn")),
                has_bias=bool(flags.get("gated_ffn_bias") or not flags.get("gated_ffn")),
            )
            problems = list(found._problems())
        if problems:
            raise CheckpointError(
                f"{path} is no dense checkpoint of a transformer_lm whose layers could have experts: it "
                f"{'; it '.join(problems[:_MAX_LISTED])}."
            )
        return found

    def _problems(self) -> Iterator[str]:
        moe = MoEConfig.from_args(self.flags)
        if moe.moe_freq > 0 or moe.megatron.selected:
            yield "was trained with --moe-freq or --num-experts"
        networks = self._networks()
        for name, shape in networks.items():
            if name not in self.tensors:
                yield f"lacks {name}"
            elif tuple(self.tensors[name].shape) != shape:
                yield f"has {name} of shape {tuple(self.tensors[name].shape)}, expected {shape}"
        layers = {str(index) for index in range(self.num_layers)}
        for name in self.tensors:
            section, index, part = [*name.split("."), "", "", ""][1:4]
            is_known = section == "layers" and index in layers and part in _BESIDE
            if section in ("layers", "mtp") and not is_known and name not in networks:
                yield f"has {name}"

    def _networks(self) -> dict[str, tuple[int, ...]]:
        """List the shapes of all layers' networks."""
        rows = 2 * self.hidden_dim if self.is_gated else self.hidden_dim
        shapes: dict[str, tuple[int, ...]] = {
            "fc1.weight": (rows, self.model_dim),
            "fc2.weight": (self.model_dim, self.hidden_dim),
        }
        if self.has_bias:
            shapes |= {"fc1.bias": (rows,), "fc2.bias": (self.model_dim,)}
        return {
            f"decoder.layers.{index}.{part}": shape
            for index in range(self.num_layers)
            for part, shape in shapes.items()
        }
