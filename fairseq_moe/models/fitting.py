"""Say why a checkpoint's tensors do not fit a model, before anything of it is loaded."""

from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ["LoadedTensors", "is_bookkeeping", "shape_problems"]

_MAX_LISTED = 3
_BOOKKEEPING = (".version", "._float_tensor")


class LoadedTensors(dict[str, Tensor]):
    """Hold a checkpoint's tensors by name, and what a model that loads them must know of their origin.

    Args:
        tensors: by name.
        source: the main file.
        dictionary: what ``dictionary_record`` has recorded there, or None in an older file.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], *, source: str, dictionary: Mapping[str, object] | None
    ) -> None:
        super().__init__(tensors)
        self.source = source
        self.dictionary = dictionary


def is_bookkeeping(name: str) -> bool:
    """Tell by its name whether a buffer is stock's own bookkeeping, on which no output depends.

    A checkpoint that no stock decoder has written, such as a converted model's, lacks it. Other buffers, such as a
    router's ``expert_bias``, are part of the model.
    """
    return name.endswith(_BOOKKEEPING)


def shape_problems(saved: Mapping[str, tuple[int, ...]], model: nn.Module) -> list[str]:
    """List the first parameters whose shapes differ, a phrase each; they must be whole, not sharded.

    Args:
        saved: shapes in the checkpoint by name, with this rank's experts.
        model: its shapes are those of this run.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    problems = [
        f"{name} has shape {saved[name]} in the checkpoint and {shape} in this run"
        for name, shape in shapes.items()
        if name in saved and saved[name] != shape
    ]
    return problems[:_MAX_LISTED]
