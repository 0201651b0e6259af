"""Register ``--bpe hf_tokenizers``: a tokenizer.json in fairseq's commands that read and write text."""

from dataclasses import dataclass, field
from pathlib import Path

from fairseq.data.encoders import register_bpe
from fairseq.dataclass import FairseqDataclass

from fairseq_moe.data.tokenizer import encode_lines, load_tokenizer

__all__ = ["HFTokenizersBPE", "HFTokenizersConfig"]


@dataclass
class HFTokenizersConfig(FairseqDataclass):
    """Flags of ``--bpe hf_tokenizers``."""

    hf_tokenizer_json: str = field(default="tokenizer.json", metadata={"help": "path to tokenizer.json"})


@register_bpe("hf_tokenizers", dataclass=HFTokenizersConfig)
class HFTokenizersBPE:
    """Encodes text as token ids written as words, for a model with an identity dictionary, and back."""

    def __init__(self, cfg: HFTokenizersConfig) -> None:
        self.tokenizer = load_tokenizer(Path(cfg.hf_tokenizer_json))

    def encode(self, text: str) -> str:
        """Encode ``"a text"`` as ``"12 7 5"``."""
        return " ".join(map(str, encode_lines(self.tokenizer, [text])[0]))

    def decode(self, words: str) -> str:
        """Decode ``"12 7 5"`` to ``"a text"``; special tokens are left out."""
        return str(self.tokenizer.decode([int(word) for word in words.split() if word.isdecimal()]))
