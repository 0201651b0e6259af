"""Mixture-of-experts language models for stock fairseq: ``fairseq-train --user-dir fairseq_moe ...``.

Importing the package registers its model, criterion and tasks and installs the adapter to stock fairseq
(``fairseq_moe.stock``), in any order with ``import fairseq`` and any number of times.
"""

import os

import fairseq

__version__ = "0.1.0"

# fairseq's --user-dir looks the package up under one of these spellings and refuses a second one.
for _spelling in (
    os.path.abspath(os.path.dirname(__file__)),
    os.path.join(os.path.dirname(fairseq.__file__), "..", "fairseq_moe"),
):
    if _spelling not in __path__:
        __path__.append(_spelling)

from fairseq_moe import criterions, stock  # noqa: E402, F401
from fairseq_moe.models.moe_transformer_lm import adopt_architectures  # noqa: E402

adopt_architectures()
stock.install()
