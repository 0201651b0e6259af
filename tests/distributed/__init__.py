"""Tests on 1, 2, 3 and 4 ranks over gloo."""
