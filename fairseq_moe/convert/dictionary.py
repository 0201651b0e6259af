"""fairseq's side of the identity dictionary, see ``dictionary_file``."""

import os
from typing import Any

from fairseq.data import Dictionary

from fairseq_moe.convert.dictionary_file import IdentityLine, parse_identity
from fairseq_moe.errors import CheckpointError, MoEError

__all__ = ["IdentityDictionary", "load_identity"]

_BEYOND = "<pad>"


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
        """The number that the word is.

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
        """Stock's signature; there is nothing to add, so ``word`` must be there already."""
        return self.index(word)

    def save(self, f: Any) -> None:
        """Write the one line of its file to ``f``, a path or an open file."""
        bos, eos = ("-" if token is None else token for token in (self.line.bos, self.line.eos))
        text = f"#identity vocab_size={self.line.vocab_size} bos={bos} eos={eos}\n"
        if isinstance(f, str):
            with open(f, "w", encoding="utf-8") as file:
                file.write(text)
        else:
            f.write(text)


def load_identity(path: str | os.PathLike[str]) -> IdentityDictionary | None:
    """The identity dictionary in the file ``path``; None if there is another dictionary in it.

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
