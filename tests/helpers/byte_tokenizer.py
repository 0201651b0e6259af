"""Write what ``preprocess`` needs of a converted model: dict.txt and hf/tokenizer.json, of byte-level tokens."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["reference_data", "write_byte_model"]

_VOCABULARY = 300


def write_byte_model(directory: Path, text: Iterable[str]) -> Path:
    """Train a tokenizer of 300 tokens on lines of text; 0 begins a text and 1 ends it.

    Args:
        directory: an existing one.
        text: lines.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from fairseq_moe.data.identity_dictionary import identity_of

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    (directory / "hf").mkdir()
    tokenizer.save(str(directory / "hf" / "tokenizer.json"))
    special = {"bos_token_id": 0, "eos_token_id": [1, 5]}
    (directory / "dict.txt").write_text(identity_of(_VOCABULARY, special).text())
    return directory


def reference_data(model: Path, texts: Iterable[Path], prefix: Path) -> tuple[bytes, bytes]:
    """Encode files as one process does, line by line and with stock's builder; returns the bytes of .bin and .idx."""
    import torch
    from fairseq.data import indexed_dataset
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(model / "hf" / "tokenizer.json"))
    builder = indexed_dataset.make_builder(f"{prefix}.bin", impl="mmap", vocab_size=_VOCABULARY)
    for path in texts:
        with path.open(encoding="utf-8", newline="\n") as file:
            for line in file:
                ids = tokenizer.encode(line.removesuffix("\n"), add_special_tokens=False).ids
                builder.add_item(torch.tensor([*ids, 1]))
    builder.finalize(f"{prefix}.idx")
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()
