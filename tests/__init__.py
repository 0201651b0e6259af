"""Tests; how to run them stands in CONTRIBUTING.md."""
