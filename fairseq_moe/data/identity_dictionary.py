"""The identity dictionary: a ``dict.txt`` in which every word is the id of a token, and padding is none of them.

fairseq's own dictionaries put four words of their own in front, which shifts all ids, and its decoder masks
every token that is padding; a converted model uses all of its ids.
"""

import os
import re
from dataclasses import dataclass
from typing import Any

from fairseq.data import Dictionary

from fairseq_moe.errors import CheckpointError, MoEError

__all__ = ["IdentityDictionary", "IdentityLine", "identity_of", "load_identity", "parse_identity"]

_BEYOND = "<pad>"
_LINE = re.compile(r"#identity vocab_size=(\d+) bos=(-|\d+) eos=(-|\d+)")


@dataclass(frozen=True, kw_only=True)
class IdentityLine:
    """Record what the one line of an identity dictionary's file says.

    Args:
        vocab_size: V; ids are 0 to V - 1, and padding is V.
        bos: id of the token that begins a text; None: there is none.
        eos: id of the token that ends it; None: there is none.
    """

    vocab_size: int
    bos: int | None
    eos: int | None

    def text(self) -> str:
        """Write out the line, as it stands in the file."""
        bos, eos = ("-" if token is None else str(token) for token in (self.bos, self.eos))
        return f"#identity vocab_size={self.vocab_size} bos={bos} eos={eos}\n"


def identity_of(vocab_size: int, config: dict[str, Any]) -> IdentityLine:
    """Make the line of a model's ``dict.txt``.

    Args:
        vocab_size: V.
        config: config.json, for ``bos_token_id`` and ``eos_token_id`` (a list: its first); no id of the model: none.
    """

    def token(key: str) -> int | None:
        value: Any = config.get(key)
        value = value[0] if isinstance(value, list) and value else value
        is_id = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size
        return value if is_id else None

    return IdentityLine(vocab_size=vocab_size, bos=token("bos_token_id"), eos=token("eos_token_id"))


def parse_identity(line: str, *, source: str) -> IdentityLine | None:
    """Read the first line of a ``dict.txt``; None if the dictionary is an ordinary one.

    Raises:
        CheckpointError: it begins like an identity dictionary and is none, or names a token that is no id.
    """
    if not line.startswith("#identity "):
        return None
    match = _LINE.fullmatch(line.strip())
    if match is None:
        raise CheckpointError(f"the dictionary {source} has the line {line.strip()!r}, which is damaged.")
    size, bos, eos = int(match[1]), *(None if text == "-" else int(text) for text in (match[2], match[3]))
    if size < 1:
        raise CheckpointError(
            f"the dictionary {source} has no ids (vocab_size={size}); convert the model again."
        )
    for name, token in (("bos", bos), ("eos", eos)):
        if token is not None and token >= size:
            raise CheckpointError(
                f"the dictionary {source} has {name}={token}, and its ids end at {size - 1}; convert the model "
                "again."
            )
    return IdentityLine(vocab_size=size, bos=bos, eos=eos)


class IdentityDictionary(Dictionary):
    """A dictionary whose words are the numbers 0 to V - 1 and whose padding is V, beyond its length.

    A token that the model does not have (a beginning, an end, an unknown word) is padding too.

    Args:
        line: what its file says.
    """

    def __init__(self, line: IdentityLine) -> None:
        super().__init__(add_special_symbols=False)
        self.line = line
        self.symbols = [str(token) for token in range(line.vocab_size)]
        self.indices = {word: token for token, word in enumerate(self.symbols)}
        self.count = [1] * line.vocab_size
        self.pad_index = self.unk_index = line.vocab_size
        self.bos_index = self.pad_index if line.bos is None else line.bos
        self.eos_index = self.pad_index if line.eos is None else line.eos
        self.pad_word = self.unk_word = _BEYOND
        self.bos_word, self.eos_word = self[self.bos_index], self[self.eos_index]
        self.nspecial = 0

    def index(self, sym: str) -> int:
        """Look up the token id that a word is.

        Raises:
            MoEError: it is none of 0 to V - 1.
        """
        if sym not in self.indices:
            raise MoEError(
                f"the word {sym!r} is no token id from 0 to {len(self) - 1}; encode the text first (--bpe "
                "hf_tokenizers, or python -m fairseq_moe.convert preprocess)."
            )
        return int(sym)

    def add_symbol(self, word: str, n: int = 1, overwrite: bool = False) -> int:
        """Look up a word under the name by which stock adds one; ``word`` must be there already."""
        return self.index(word)

    def save(self, f: Any) -> None:
        """Write the one line of its file to ``f``, a path or an open file."""
        if isinstance(f, str):
            with open(f, "w", encoding="utf-8") as file:
                file.write(self.line.text())
        else:
            f.write(self.line.text())


def load_identity(path: str | os.PathLike[str]) -> IdentityDictionary | None:
    """Load the identity dictionary in the file ``path``; None if there is another dictionary in it.

    Raises:
        CheckpointError: it begins like one and is damaged.
    """
    try:
        with open(path, encoding="utf-8") as file:
            first = file.readline(200)
    except (OSError, UnicodeError) as error:
        raise CheckpointError(f"cannot read the dictionary {path} ({error}).") from error
    line = parse_identity(first, source=str(path))
    return None if line is None else IdentityDictionary(line)
