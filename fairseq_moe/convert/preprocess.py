"""Encode raw text as fairseq's .bin and .idx, with the identity dictionary of a converted model."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from fairseq.data import indexed_dataset

from fairseq_moe.convert.directories import appearing
from fairseq_moe.convert.store import COMPANIONS
from fairseq_moe.data.identity_dictionary import load_identity
from fairseq_moe.data.tokenizer import encode_lines, load_tokenizer
from fairseq_moe.errors import CheckpointError, MoEError

__all__ = ["preprocess"]

_LINES_AT_ONCE = 1000


def preprocess(
    model: Path,
    destdir: Path,
    texts: dict[str, Path],
    *,
    tokenizer: Path | None = None,
    prepend_bos: bool = False,
    append_eos: bool = True,
) -> dict[str, int]:
    """Encode texts line by line, as ``fairseq-preprocess --only-source`` does.

    Args:
        model: directory that ``from_hf`` made: its dict.txt and hf/tokenizer.json are used.
        destdir: directory to be made.
        texts: a file of UTF-8 text for each split (train, valid, test).
        tokenizer: another tokenizer.json.
        prepend_bos: begin each line with the model's beginning token.
        append_eos: end each line with the model's end token.

    Returns:
        tokens of each split.

    Raises:
        MoEError: there is no such tokenizer, dictionary or text, or the model lacks a token that is asked for.
    """
    dictionary = load_identity(model / "dict.txt")
    if dictionary is None:
        raise CheckpointError(
            f"{model / 'dict.txt'} is no identity dictionary; give a directory that from-hf made."
        )
    line = dictionary.line
    if append_eos and line.eos is None:
        raise MoEError(f"{model / 'dict.txt'} names no end token; pass --no-append-eos.")
    if prepend_bos and line.bos is None:
        raise MoEError(f"{model / 'dict.txt'} names no beginning token; leave out --prepend-bos.")
    before = [dictionary.bos()] if prepend_bos else []
    after = [dictionary.eos()] if append_eos else []
    encoder = load_tokenizer(tokenizer or model / COMPANIONS / "tokenizer.json", vocab_size=line.vocab_size)
    counts = {}
    with appearing(destdir) as directory:
        dictionary.save(str(directory / "dict.txt"))
        for split, path in texts.items():
            prefix = str(directory / split)
            builder = indexed_dataset.make_builder(f"{prefix}.bin", impl="mmap", vocab_size=len(dictionary))
            counts[split] = 0
            for chunk in _chunks(path):
                for ids in encode_lines(encoder, chunk):
                    item = torch.tensor([*before, *ids, *after], dtype=torch.int64)
                    counts[split] += len(item)
                    builder.add_item(item)
            builder.finalize(f"{prefix}.idx")
    return counts


def _chunks(path: Path) -> Iterator[list[str]]:
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            lines = (line.removesuffix("\n") for line in file)
            while chunk := list(islice(lines, _LINES_AT_ONCE)):
                yield chunk
    except (OSError, UnicodeError) as error:
        raise MoEError(f"cannot read the text {path} ({error}).") from error
