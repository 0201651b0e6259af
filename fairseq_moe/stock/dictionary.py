"""Let stock's language modelling task and generators take the dictionaries of converted models."""

from collections.abc import Callable
from typing import Any

from fairseq_moe.data.identity_dictionary import IdentityDictionary, load_identity
from fairseq_moe.errors import MoEError
from fairseq_moe.stock.seam import seam


@seam(
    "fairseq.tasks.language_modeling:Dictionary",
    signature=None,
    stock_does="puts four words of its own in front of those of dict.txt",
    breaks="all token ids of a converted model are shifted, and one of them means padding",
    we_do="a dict.txt that begins with #identity gives a dictionary whose words are the ids, with padding "
    "beyond them",
    test="tests/unit/data/test_identity_dictionary.py",
)
def language_modeling_dictionary(stock: Any) -> Any:
    class LanguageModelingDictionary(stock):  # type: ignore[misc]
        @classmethod
        def load(cls, f: Any, add_special_symbols: bool = True) -> Any:
            identity = load_identity(f) if isinstance(f, str) else None
            return stock.load(f, add_special_symbols) if identity is None else identity

    return LanguageModelingDictionary


@seam(
    "fairseq.tasks.language_modeling:LanguageModelingTask.__init__",
    signature="(self, args, dictionary, output_dictionary, targets)",
    stock_does="begins texts with the dictionary's beginning token where --add-bos-token asks for it",
    breaks="a converted model without one begins them with padding, in silence",
    we_do="refuse the flag, in every command that sets the task up",
    test="tests/e2e/test_missing_tokens.py",
)
def language_modeling_task(
    stock: Callable[..., None], self: Any, args: Any, dictionary: Any, *rest: Any, **kwargs: Any
) -> None:
    lacks_bos = isinstance(dictionary, IdentityDictionary) and dictionary.line.bos is None
    if lacks_bos and getattr(args, "add_bos_token", False):
        raise MoEError(
            "the model's dict.txt names no beginning token; leave out --add-bos-token.", agreed=True
        )
    stock(self, args, dictionary, *rest, **kwargs)


@seam(
    "fairseq.sequence_generator:SequenceGenerator.__init__",
    signature="(self, models, tgt_dict, beam_size, max_len_a, max_len_b, max_len, min_len, normalize_scores, "
    "len_penalty, unk_penalty, temperature, match_source_len, no_repeat_ngram_size, search_strategy, eos, "
    "symbols_to_strip_from_output, lm_model, lm_weight, tokens_to_suppress)",
    stock_does="takes the length of the dictionary for the number of columns that models give",
    breaks="with padding beyond the words of the dictionary, models give a column for it too",
    we_do="count up to padding; refuse a dictionary without an end token, which every sentence is ended by",
    test="tests/e2e/test_convert.py",
)
def sequence_generator(
    stock: Callable[..., None], self: Any, models: Any, tgt_dict: Any, *args: Any, **kwargs: Any
) -> None:
    if isinstance(tgt_dict, IdentityDictionary) and tgt_dict.line.eos is None:
        raise MoEError(
            "the model's dict.txt names no end token, and generation ends every sentence with it; put the id of one "
            "there (eos=ID in place of eos=-).",
            agreed=True,
        )
    stock(self, models, tgt_dict, *args, **kwargs)
    self.vocab_size = max(self.vocab_size, tgt_dict.pad() + 1)
