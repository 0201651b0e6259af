"""The identity dictionary: a ``dict.txt`` in which every word is the id of a token, and padding is none of them.

fairseq's own dictionaries put four words of their own in front, which shifts all ids, and its decoder masks
every token that is padding; a converted model uses all of its ids.
"""

import re
from dataclasses import dataclass
from typing import Any

from fairseq_moe.errors import CheckpointError

__all__ = ["IdentityLine", "dictionary_text", "parse_identity"]

_LINE = re.compile(r"#identity vocab_size=(\d+) bos=(-|\d+) eos=(-|\d+)")


@dataclass(frozen=True, kw_only=True)
class IdentityLine:
    """What the one line of such a file says.

    Args:
        vocab_size: V; ids are 0 to V - 1, and padding is V.
        bos: id of the token that begins a text; None: there is none.
        eos: id of the token that ends it; None: there is none.
    """

    vocab_size: int
    bos: int | None
    eos: int | None


def dictionary_text(vocab_size: int, config: dict[str, Any]) -> str:
    """The contents of ``dict.txt``.

    Args:
        vocab_size: V.
        config: config.json, for ``bos_token_id`` and ``eos_token_id`` (a list: its first).
    """
    ids = []
    for key in ("bos_token_id", "eos_token_id"):
        value = config.get(key)
        value = value[0] if isinstance(value, list) and value else value
        is_id = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size
        ids.append(str(value) if is_id else "-")
    return f"#identity vocab_size={vocab_size} bos={ids[0]} eos={ids[1]}\n"


def parse_identity(line: str, *, source: str) -> IdentityLine | None:
    """The first line of a ``dict.txt``; None if it is an ordinary one.

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
