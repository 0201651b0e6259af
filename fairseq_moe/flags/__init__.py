"""What do the flags mean, and which combinations are refused? Records, tables and sentences; no model.

Tests: tests/unit/flags, tests/reliability/test_r19_bad_flags.py; agreement:
tests/reliability/test_r18_different_batches.py; blocks: tests/unit/models; freezing:
tests/distributed/test_freezing.py.
"""
