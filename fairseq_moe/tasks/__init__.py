"""Which fairseq tasks are added? None: checks and hooks of a step act on stock's tasks (see ``stock``).

Tests: tests/unit/test_imports.py, as there is no code.
"""
