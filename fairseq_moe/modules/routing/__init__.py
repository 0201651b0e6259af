"""Which token goes to which expert, with which weight, and what does balance cost?

Tests: tests/unit/modules/test_branch.py, tests/unit/modules/test_topk.py, tests/unit/modules/test_router.py,
tests/unit/modules/test_losses.py, tests/unit/modules/test_stats.py, tests/numerics/test_gate_against_masks.py,
tests/numerics/test_routing_fixtures.py.
"""
