"""What does a Hugging Face directory say, and how is one written?

Tests: tests/unit/convert/test_convert_config.py, tests/unit/convert/test_convert_files.py; names:
tests/numerics/test_convert_logits.py.
"""
