"""fairseq models; every module here is imported by fairseq's --user-dir.

Tests: tests/unit/models, tests/distributed/test_decoder.py, tests/distributed/test_blocks.py; attention:
tests/unit/modules/test_blocks.py; whole models: tests/numerics/test_families_against_transformers.py.
"""
