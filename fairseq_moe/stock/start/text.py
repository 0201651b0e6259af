"""Text that is not there: a split that does not exist, that is empty, or of which no batch can be made."""

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

from fairseq import utils

from fairseq_moe.errors import MoEError, TextError
from fairseq_moe.stock.seam import seam

_NOT_FOUND = "Dataset not found"  # how stock's message begins


@seam(
    "fairseq.tasks.language_modeling:LanguageModelingTask.load_dataset",
    signature="(self, split, epoch, combine, **kwargs)",
    stock_does="ends in stack traces where a split is not there, or fairseq-preprocess was given an empty file",
    breaks="they name mmap and not the text",
    we_do="one sentence that names the file, whatever the model; the error is still one of stock's classes",
    test="tests/e2e/test_bad_input.py",
)
def load_dataset(
    stock: Callable[..., Any], self: Any, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any
) -> Any:
    folders = utils.split_paths(self.args.data)
    path = os.path.join(folders[(epoch - 1) % len(folders)], split)
    # Before stock opens it: an index that fails half-way prints a trace of its own when it is thrown away.
    for part in _parts(path, combine=combine):
        if os.path.getsize(part) == 0:
            raise TextError(
                f"{part} is empty, so there is no text in the split {split!r}; give fairseq-preprocess text for it, "
                "or choose another split."
            )
    try:
        return stock(self, split, epoch, combine, **kwargs)
    except FileNotFoundError as error:
        if not str(error).startswith(_NOT_FOUND):
            raise
        raise TextError(
            f"there is no text of the split {split!r}: {path}.idx and .bin do not exist; correct the data directory or "
            "the split, or binarise text with fairseq-preprocess --only-source (of a converted model: "
            "fairseq-moe-convert preprocess)."
        ) from error


def _parts(path: str, *, combine: bool) -> Iterator[str]:
    """List the files of text that stock would read: PATH.bin or, raw, PATH; to combine, also PATH1 and so on."""
    for number in itertools.count() if combine else range(1):
        stem = f"{path}{number or ''}"
        found = [name for name in (stem + ".bin", stem) if os.path.isfile(name)]
        if not found:
            return
        yield found[0]


@seam(
    "fairseq.data.iterators:EpochBatchIterator.first_batch",
    signature="(self)",
    stock_does="raises an exception with several guesses where there is no batch",
    breaks="a validation text of fewer than eight blocks ends a run in a stack trace",
    we_do="one sentence with the number of samples and the flags that leave them out",
    test="tests/e2e/test_bad_input.py",
)
def first_batch(stock: Callable[..., Any], self: Any) -> Any:
    if len(self.frozen_batches) > 0:
        return stock(self)
    raise MoEError(
        f"no batch can be made of a split with {len(self.dataset)} samples (blocks of text): there are fewer than "
        "--required-batch-size-multiple (8 unless given), or all of them were left out, as a warning above says; give "
        "more text, --required-batch-size-multiple 1, or a smaller --tokens-per-sample.",
        agreed=True,
    )
