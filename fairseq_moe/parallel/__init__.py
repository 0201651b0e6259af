"""Which rank holds what? Arithmetic on whole numbers; no process group, no tensor.

Tests: tests/unit/parallel.
"""
