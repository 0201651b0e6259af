"""Which published families are there, and how are their config.json and their tensors' names read and written?

Published files (transformers 4) leave out what was a default of their modelling code; transformers 5 writes
everything. Both are read. A key that is not understood is refused, because a model that is read without it may be
another model.

Tests: tests/unit/convert/test_convert_config.py, tests/unit/convert/test_convert_config_keys.py;
tests/numerics/test_config_readings.py.
"""

from fairseq_moe.convert.hf.families.family import ExpertNames, Family
from fairseq_moe.convert.hf.families.reading import read_config, read_keys
from fairseq_moe.convert.hf.families.table import FAMILIES

__all__ = ["FAMILIES", "ExpertNames", "Family", "read_config", "read_keys"]
