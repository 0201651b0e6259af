"""Turn text into token ids and back, with a model's own tokenizer and the beginning token that it was trained with."""

import json
from pathlib import Path
from typing import Any, Protocol

from fairseq.data import Dictionary, encoders

from fairseq_moe.data.identity_dictionary import IdentityDictionary
from fairseq_moe.data.tokenizer import encode_lines, load_tokenizer
from fairseq_moe.errors import MoEError

__all__ = ["ConvertedText", "DictionaryText", "Text"]


class Text(Protocol):
    """Encode and decode the text of one model.

    Args:
        end: id of the token that ends a text.
        beginning: id of the token that stands before a text of which nothing is before.
        begins: that token begins every prompt, too.
    """

    end: int
    beginning: int
    begins: bool

    def encode(self, text: str) -> list[int]:
        """Encode text without any special token."""

    def decode(self, ids: list[int]) -> str:
        """Decode ids; special tokens are left out."""

    def word(self, token: int) -> str:
        """Show one token, a special one included."""


class ConvertedText:
    """Encode with the tokenizer.json of a converted model.

    Every prompt begins with the beginning token if ``add_bos_token`` of tokenizer_config.json says so or, where it is
    silent, if the template of tokenizer.json does: that is how transformers reads them.

    Args:
        dictionary: of the model.
        path: of tokenizer.json.

    Raises:
        MoEError: the file cannot be read, or the model has neither a beginning nor an end token.
    """

    def __init__(self, dictionary: IdentityDictionary, path: Path) -> None:
        line = dictionary.line
        self._tokenizer = load_tokenizer(path, vocab_size=line.vocab_size)
        if line.eos is None:
            raise MoEError(f"the dictionary beside {path} names no end token, so that no answer would end.")
        self.end = line.eos
        self.beginning = line.eos if line.bos is None else line.bos
        self.begins = line.bos is not None and _begins(self._tokenizer, path, line.bos)

    def encode(self, text: str) -> list[int]:
        """Encode text without any special token."""
        return encode_lines(self._tokenizer, [text])[0]

    def decode(self, ids: list[int]) -> str:
        """Decode ids; special tokens are left out."""
        return str(self._tokenizer.decode(ids))

    def word(self, token: int) -> str:
        """Show one token, a special one included."""
        return str(self._tokenizer.decode([token], skip_special_tokens=False))


def _begins(tokenizer: Any, path: Path, bos: int) -> bool:
    config = path.with_name("tokenizer_config.json")
    if config.is_file():
        try:
            said = json.loads(config.read_text(encoding="utf-8")).get("add_bos_token")
        except (OSError, ValueError, AttributeError) as error:
            raise MoEError(f"cannot read {config} ({error}).") from error
        if isinstance(said, bool):
            return said
    return bool(tokenizer.encode("").ids[:1] == [bos])


class DictionaryText:
    """Encode with fairseq's own dictionary, and with the --tokenizer and --bpe that the checkpoint names.

    Args:
        dictionary: of the model.
        cfg: of the checkpoint.
    """

    def __init__(self, dictionary: Dictionary, cfg: Any) -> None:
        self._dictionary = dictionary
        self._encoders = [
            found
            for found in (encoders.build_tokenizer(cfg.tokenizer), encoders.build_bpe(cfg.bpe))
            if found is not None
        ]
        self.begins = bool(cfg.task.get("add_bos_token", False))
        self.end = dictionary.eos()
        # Without --add-bos-token a model has seen the end of one text before the next.
        self.beginning = dictionary.bos() if self.begins else dictionary.eos()

    def encode(self, text: str) -> list[int]:
        """Encode text without any special token."""
        for encoder in self._encoders:
            text = encoder.encode(text)
        ids = self._dictionary.encode_line(text, add_if_not_exist=False, append_eos=False)
        return [int(token) for token in ids]

    def decode(self, ids: list[int]) -> str:
        """Decode ids; special tokens are left out."""
        special = {self._dictionary.bos(), self._dictionary.eos(), self._dictionary.pad()}
        text = " ".join(self._dictionary[token] for token in ids if token not in special)
        for encoder in reversed(self._encoders):
            text = encoder.decode(text)
        return text

    def word(self, token: int) -> str:
        """Show one token, a special one included."""
        return str(self._dictionary[token])
