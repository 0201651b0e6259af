"""Dictionaries of converted models in stock's language modelling task."""

from typing import Any

from fairseq_moe.convert.dictionary import load_identity
from fairseq_moe.stock.seam import seam


@seam(
    "fairseq.tasks.language_modeling:Dictionary",
    signature=None,
    stock_does="puts four words of its own in front of those of dict.txt",
    breaks="all token ids of a converted model are shifted, and one of them means padding",
    we_do="a dict.txt that begins with #identity gives a dictionary whose words are the ids, with padding "
    "beyond them",
    test="tests/unit/test_convert_dictionary.py",
)
def language_modeling_dictionary(stock: Any) -> Any:
    class LanguageModelingDictionary(stock):  # type: ignore[misc]
        @classmethod
        def load(cls, f: Any, add_special_symbols: bool = True) -> Any:
            identity = load_identity(f) if isinstance(f, str) else None
            return stock.load(f, add_special_symbols) if identity is None else identity

    return LanguageModelingDictionary
