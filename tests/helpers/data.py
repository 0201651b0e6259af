"""Make a tiny data set of real text, Python's own documentation, binarised with fairseq's code."""

from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

__all__ = ["build_text_data"]

_NUM_LINES = {"train": 160, "valid": 21, "test": 20}  # odd on purpose: ranks get different numbers of batches
_WORDS_PER_LINE = 24
_VOCABULARY = 200


def build_text_data(rank: int, folder: str) -> None:
    """Write ``dict.txt`` and the binarised splits into ``folder``, in the form of fairseq-preprocess.

    Args:
        rank: ignored; it lets the function run under ``run_ranks``, where fairseq is imported already.
        folder: an existing directory.
    """
    # Not at the top: it takes seconds, and the pytest process does without fairseq.
    from fairseq.data import Dictionary, indexed_dataset

    dictionary = Dictionary()
    lines = list(_lines(sum(_NUM_LINES.values())))
    for line in lines:
        dictionary.encode_line(line, add_if_not_exist=True)
    dictionary.finalize(nwords=_VOCABULARY, padding_factor=1)
    dictionary.save(str(Path(folder) / "dict.txt"))
    start = 0
    for split, num_lines in _NUM_LINES.items():
        prefix = str(Path(folder) / split)
        builder = indexed_dataset.make_builder(f"{prefix}.bin", impl="mmap", vocab_size=len(dictionary))
        for line in lines[start : start + num_lines]:
            builder.add_item(dictionary.encode_line(line, add_if_not_exist=False))
        builder.finalize(f"{prefix}.idx")
        start += num_lines


def _lines(count: int) -> Iterator[str]:
    """Take ``count`` lines of words in lower case, the same in every run on one Python."""
    words = [word for name in sorted(topics) for word in topics[name].lower().split() if word.isalpha()]
    for index in range(count):
        yield " ".join(words[index * _WORDS_PER_LINE : (index + 1) * _WORDS_PER_LINE])
