"""Encode raw text as fairseq's .bin and .idx, with the identity dictionary of a converted model."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from fairseq.data import indexed_dataset

from fairseq_moe.checkpoint import sha256_of
from fairseq_moe.convert.directories import appearing
from fairseq_moe.convert.store import COMPANIONS
from fairseq_moe.convert.text.joining import join
from fairseq_moe.convert.text.parts import Parts, Recipe, own_parts
from fairseq_moe.convert.text.pieces import Piece, cut
from fairseq_moe.convert.text.workers import Workers
from fairseq_moe.data.identity_dictionary import IdentityDictionary, load_identity
from fairseq_moe.data.tokenizer import load_tokenizer
from fairseq_moe.errors import CheckpointError, MoEError
from fairseq_moe.faults import fault
from fairseq_moe.progress import progress

__all__ = ["preprocess"]


def preprocess(
    model: Path,
    destdir: Path,
    texts: Mapping[str, Sequence[Path]],
    *,
    tokenizer: Path | None = None,
    prepend_bos: bool = False,
    append_eos: bool = True,
    num_workers: int | None = None,
    piece_bytes: int | None = None,
) -> dict[str, int]:
    """Encode texts line by line, as ``fairseq-preprocess --only-source`` does.

    Finished pieces lie in DESTDIR.parts until all are there; after a kill or an error the same call goes on from them.

    Args:
        model: directory that ``from_hf`` made: its dict.txt and hf/tokenizer.json are used.
        destdir: directory to be made.
        texts: files of UTF-8 text for each split (train, valid, test), which lie behind one another in the data.
        tokenizer: another tokenizer.json.
        prepend_bos: begin each line with the model's beginning token.
        append_eos: end each line with the model's end token.
        num_workers: processes that encode; None: one for each core.
        piece_bytes: how much text a worker takes at a time, at least; None: what fits the text.

    Returns:
        tokens of each split.

    Raises:
        MoEError: there is no such tokenizer, dictionary or text, the text is not UTF-8, the model lacks a token that is
            asked for, a worker was killed, or the disk is full.
    """
    if destdir.exists():
        raise CheckpointError(
            f"{destdir} exists; nothing is overwritten, so give another place or remove it."
        )
    dictionary = load_identity(model / "dict.txt")
    if dictionary is None:
        raise CheckpointError(
            f"{model / 'dict.txt'} is no identity dictionary; give a directory that from-hf made."
        )
    recipe = _recipe(model, dictionary, tokenizer, prepend_bos=prepend_bos, append_eos=append_eos)
    pieces = cut(texts, piece_bytes)
    with own_parts(destdir.with_name(f"{destdir.name}.parts"), recipe) as parts:
        try:
            _make_parts(parts, [piece for of_split in pieces.values() for piece in of_split], num_workers)
            return _join(parts, pieces, destdir, dictionary)
        except MoEError as error:
            raise MoEError(
                f"{str(error).rstrip('.')}; finished pieces are kept in {parts.directory}, and the same command goes "
                "on from them."
            ) from error


def _recipe(
    model: Path,
    dictionary: IdentityDictionary,
    tokenizer: Path | None,
    *,
    prepend_bos: bool,
    append_eos: bool,
) -> Recipe:
    line, path = dictionary.line, tokenizer or model / COMPANIONS / "tokenizer.json"
    if append_eos and line.eos is None:
        raise MoEError(f"{model / 'dict.txt'} names no end token; pass --no-append-eos.")
    if prepend_bos and line.bos is None:
        raise MoEError(f"{model / 'dict.txt'} names no beginning token; leave out --prepend-bos.")
    return Recipe(
        tokenizer=load_tokenizer(path, vocab_size=line.vocab_size),
        tokenizer_sha256=sha256_of(path),
        before=(dictionary.bos(),) if prepend_bos else (),
        after=(dictionary.eos(),) if append_eos else (),
        dtype=np.dtype(indexed_dataset.best_fitting_int_dtype(len(dictionary))).name,
    )


def _make_parts(parts: Parts, pieces: Sequence[Piece], num_workers: int | None) -> None:
    """Make the parts that are not there, in workers, and say which of an earlier run are used."""
    missing = []
    reasons: dict[str, str] = {}
    for piece in pieces:
        reason = parts.disagreement(piece)
        if reason is not None:
            missing.append(piece)
        if reason:
            reasons[piece.name] = reason
    num_kept = len(pieces) - len(missing)
    if num_kept or reasons:
        _note(f"{num_kept} of {len(pieces)} pieces were finished by an earlier run in {parts.directory}.")
    if reasons:
        name, reason = next(iter(reasons.items()))
        _note(f"pieces that are made again: {len(reasons)} ({name} does not agree, {reason}).")
    workers = Workers(min(num_workers or len(os.sched_getaffinity(0)), len(missing)), parts.make)
    total_bytes = sum(piece.end - piece.start for piece in pieces)
    with workers, progress("encoding", total_bytes) as advance:
        advance(total_bytes - sum(piece.end - piece.start for piece in missing))
        for piece in workers.run(missing):
            fault("save.part_known")
            advance(piece.end - piece.start)


def _join(
    parts: Parts, pieces: Mapping[str, Sequence[Piece]], destdir: Path, dictionary: IdentityDictionary
) -> dict[str, int]:
    dtype = parts.recipe.dtype
    code = indexed_dataset._dtype_header_code(np.dtype(dtype).type)
    counts = {}
    paths = {split: [parts.path(piece) for piece in of_split] for split, of_split in pieces.items()}
    total_bytes = sum(path.stat().st_size for of_split in paths.values() for path in of_split)
    with (
        appearing(destdir, within=parts.directory) as directory,
        progress("joining", total_bytes) as advance,
    ):
        dictionary.save(str(directory / "dict.txt"))
        for split, of_split in paths.items():
            counts[split] = join(of_split, directory / split, dtype, code, advance)
    return counts


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
