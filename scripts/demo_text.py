"""The text of the demo: documents, paragraphs, a tokenizer trained on the spot, files for preprocessing."""

import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

__all__ = ["NEWLINE", "DemoError", "prepare_text"]

VOCABULARY = 2000
TOKENIZER_SAMPLE_CHARS = 1_000_000
MAX_TEXT_CHARS = 4_000_000
# Every 40th document is held out. Documents of a --text FILE are slices of this size.
HELD_OUT_EVERY = 40
SLICE_CHARS = 20_000
# Packages of the standard library whose files are prose in Python, not tables.
PACKAGES = (
    ".",
    "asyncio",
    "email",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
)
NEWLINE = "<n>"
CONTROL = re.compile(r"[^\S ]|[\x00-\x1f]")  # all blanks but the space, and control characters


class DemoError(Exception):
    """One sentence for the user."""


def prepare_text(source: Path | None, *, work: Path) -> str:
    """Write train.txt and valid.txt in pieces, one paragraph per line, and dict.txt; return a prompt."""
    documents = list(_library() if source is None else _slices(source))
    valid = documents[::HELD_OUT_EVERY]
    train = [document for index, document in enumerate(documents) if index % HELD_OUT_EVERY]
    if not train:
        raise DemoError(f"{source} is too short, expected at least {2 * SLICE_CHARS:,} characters.")
    tokenizer = _train_tokenizer(train, work=work)
    pieces = tokenizer.id_to_piece(list(range(3, tokenizer.vocab_size())))  # after <unk>, <s> and </s>
    (work / "dict.txt").write_text("".join(f"{piece} 1\n" for piece in pieces), encoding="utf-8")
    for name, part in (("train", train), ("valid", valid)):
        lines = [_pieces(tokenizer, paragraph) for document in part for paragraph in _paragraphs(document)]
        (work / f"{name}.txt").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        num_pieces = sum(line.count(" ") + 1 for line in lines)
        print(f"{name}: {len(part)} documents, {len(lines):,} paragraphs, {num_pieces:,} pieces")
    if source is None:
        return f"def read(self, size=-1):{NEWLINE}"
    words = valid[0].split()
    return " ".join(words[:8])


def _library() -> Iterator[str]:
    """Python files, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left = MAX_TEXT_CHARS
    for path in sorted(path for package in PACKAGES for path in (root / package).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        left -= len(text)
        if left < 0:
            return
        yield text


def _slices(source: Path) -> Iterator[str]:
    """A file cut between paragraphs, or between lines where paragraphs are longer than a slice."""
    try:
        text = source.read_text(encoding="utf-8", errors="replace")[:MAX_TEXT_CHARS]
    except OSError as error:
        raise DemoError(f"the text {source} cannot be read: {error.strerror}.") from None
    start = 0
    while start < len(text):
        end = start + SLICE_CHARS
        for separator in ("\n\n", "\n", " "):
            cut = text.rfind(separator, start + 1, end)
            if cut > 0 and end < len(text):
                end = cut
                break
        yield text[start:end]
        start = end


def _paragraphs(document: str) -> Iterator[str]:
    """Blocks between blank lines, one line each; a newline within becomes a symbol, so that it is learned."""
    for block in re.split(r"\n\s*\n", document):
        lines = [CONTROL.sub(" ", line.expandtabs(4)).rstrip() for line in block.split("\n")]
        if any(lines):
            yield NEWLINE.join(line for line in lines if line)


def _train_tokenizer(documents: Sequence[str], *, work: Path) -> SentencePieceProcessor:
    every = sum(map(len, documents)) // TOKENIZER_SAMPLE_CHARS + 1
    sample = (paragraph for document in documents[::every] for paragraph in _paragraphs(document))
    try:
        SentencePieceTrainer.train(
            sentence_iterator=sample,
            model_prefix=str(work / "spm"),
            model_type="bpe",
            vocab_size=VOCABULARY,
            user_defined_symbols=[NEWLINE],
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=100_000,
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DemoError(f"no tokenizer of {VOCABULARY} pieces can be made from this text: {error}.") from None
    return SentencePieceProcessor(model_file=str(work / "spm.model"))


def _pieces(tokenizer: SentencePieceProcessor, paragraph: str) -> str:
    """Pieces between blanks. By way of their ids, so that an unknown character is <unk>, for fairseq too."""
    return " ".join(tokenizer.id_to_piece(tokenizer.encode(paragraph)))
