"""How does text become token ids? The identity dictionary and tokenizer of converted models.

Tests: tests/unit/data.
"""
