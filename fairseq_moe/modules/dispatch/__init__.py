"""How do rows reach the experts and come back?

Tests: tests/unit/modules/test_dispatchers.py, tests/unit/modules/test_rows.py,
tests/unit/modules/test_expert_work.py; on ranks: tests/distributed/test_uneven_batches.py,
tests/reliability/test_r15_no_tokens.py.
"""
