"""How does a published model become a checkpoint of ours, and go back to a Hugging Face directory?

Works on files: no GPU, no network, no process group, no transformers, and memory for one tensor at a time.

Tests: tests/unit/convert, tests/e2e/test_convert.py, tests/numerics/test_convert_logits.py; preprocess:
tests/unit/data, tests/unit/convert/test_preprocess_pieces.py, tests/reliability/test_preprocess.py.
"""

from fairseq_moe.convert.from_hf import Conversion, from_hf
from fairseq_moe.convert.to_hf import to_hf

__all__ = ["Conversion", "from_hf", "to_hf"]
