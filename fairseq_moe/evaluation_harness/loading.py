"""Find a checkpoint, its dictionary and its tokenizer, and load the model as fairseq's hub interface does."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq import hub_utils, utils

from fairseq_moe.convert.store import COMPANIONS
from fairseq_moe.data.identity_dictionary import IdentityDictionary
from fairseq_moe.errors import MoEError
from fairseq_moe.evaluation_harness.text import ConvertedText, DictionaryText, Text

__all__ = ["LoadedModel", "load_model"]


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """Hold a model and what its text needs.

    Args:
        model: fairseq's language model, in evaluation mode.
        text: its tokenizer.
        positions: tokens that it can read at once.
        padding: id that fills up shorter sentences of a batch.
    """

    model: Any
    text: Text
    positions: int
    padding: int


def load_model(
    path: Path, *, data: Path | None, tokenizer: Path | None, overrides: Mapping[str, Any]
) -> LoadedModel:
    """Load a model for use in this process, all its experts included.

    Args:
        path: a directory that from-hf made, or a checkpoint's .pt file.
        data: directory with dict.txt; None: the checkpoint's own.
        tokenizer: tokenizer.json of a converted model; None: hf/tokenizer.json beside the checkpoint or in ``data``.
        overrides: settings of the checkpoint's configuration to replace, as --model-overrides takes them.

    Raises:
        MoEError: a file is missing or cannot be read.
    """
    checkpoint = path / "checkpoint.pt" if path.is_dir() else path
    if not checkpoint.is_file():
        raise MoEError(
            f"there is no checkpoint {checkpoint}; path must be a directory that from-hf made, or a .pt file."
        )
    checkpoint = checkpoint.resolve()
    folder = (data or checkpoint.parent).resolve()
    if not (folder / "dict.txt").is_file():
        raise MoEError(f"there is no {folder / 'dict.txt'}; say with data=DIR where the model's dict.txt is.")
    found = hub_utils.from_pretrained(
        str(checkpoint.parent), checkpoint.name, data_name_or_path=str(folder), **overrides
    )
    (model,), task = found["models"], found["task"]
    dictionary = task.source_dictionary
    text: Text
    if isinstance(dictionary, IdentityDictionary):
        text = ConvertedText(dictionary, tokenizer or _beside(checkpoint.parent, folder))
    elif tokenizer is not None:
        raise MoEError(
            f"{folder / 'dict.txt'} is a dictionary of fairseq's, with which tokenizer={tokenizer} does not go; name "
            "what --bpe and its flags were (bpe=sentencepiece,sentencepiece_model=FILE)."
        )
    else:
        text = DictionaryText(dictionary, found["args"])
    return LoadedModel(
        model=model.eval(),
        text=text,
        positions=int(utils.resolve_max_positions(model.max_positions())),
        padding=dictionary.pad(),
    )


def _beside(*folders: Path) -> Path:
    places = [folder / COMPANIONS / "tokenizer.json" for folder in folders]
    found = [place for place in places if place.is_file()]
    if not found:
        raise MoEError(
            f"there is no {places[0]}; say with tokenizer=FILE where the model's tokenizer.json is."
        )
    return found[0]
