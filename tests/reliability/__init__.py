"""Faults that a run of weeks meets: one file per row of the table in README.md."""
