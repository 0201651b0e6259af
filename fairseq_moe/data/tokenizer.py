"""Encode text as token ids and back with a Hugging Face ``tokenizer.json``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fairseq_moe.errors import MoEError

__all__ = ["encode_lines", "load_tokenizer"]


def load_tokenizer(path: Path, *, vocab_size: int | None = None) -> Any:
    """Load a tokenizer.json as a ``tokenizers.Tokenizer``.

    Args:
        path: of tokenizer.json.
        vocab_size: of the model, if it is known.

    Raises:
        MoEError: the library is missing, the file cannot be read, or it has ids that the model has not.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MoEError(
            "this needs the tokenizers package; install it with: pip install tokenizers"
        ) from error
    if not path.is_file():
        raise MoEError(f"there is no {path}; give the tokenizer.json of the model.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise MoEError(f"cannot read the tokenizer {path} ({error}).") from error
    # Batches of inference need these; in data they would cut lines off and fill them up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    largest = max(tokenizer.get_vocab().values(), default=0)
    if vocab_size is not None and largest >= vocab_size:
        raise MoEError(f"{path} has token id {largest}, and the model's ids end at {vocab_size - 1}.")
    return tokenizer


def encode_lines(tokenizer: Any, lines: Sequence[str]) -> list[list[int]]:
    """Encode each line as token ids, without tokens that the tokenizer would put around them."""
    return [found.ids for found in tokenizer.encode_batch(list(lines), add_special_tokens=False)]
