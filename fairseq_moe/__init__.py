"""Mixture-of-experts language models for stock fairseq: ``fairseq-train --user-dir fairseq_moe ...``.

Importing the package registers its model, criterion and tasks and installs the adapter to stock fairseq
(``fairseq_moe.stock``), in any order with ``import fairseq`` and any number of times.

Tests: tests/unit/test_imports.py; faults: tests/reliability/test_faults.py; progress: tests/unit/checkpoint_tools.
"""

from fairseq_moe import criterions, stock, tasks  # noqa: F401  (register themselves)
from fairseq_moe.data import hf_bpe  # noqa: F401
from fairseq_moe.models.moe_transformer_lm import adopt_architectures

__version__ = "0.1.0"

adopt_architectures()
stock.install()
