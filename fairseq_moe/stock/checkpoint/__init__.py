"""How does stock's trainer save and load an MoE model?

``checkpoint`` answers what the files are that it writes and reads, without fairseq and without other ranks;
``checkpoint_tools`` what one can do with them from the command line.

Tests: tests/distributed/test_checkpoint.py; saving, writing: tests/reliability/test_r01_killed_saves.py,
tests/reliability/test_r03_failed_saves.py; background: tests/reliability/test_background_saves.py; retention:
tests/reliability/test_r26_retention.py; loading, reading: tests/reliability/test_r07_other_layouts.py,
tests/reliability/test_r09_missing_files.py; mismatch: tests/reliability/test_r08_other_models.py; changes:
tests/reliability/test_resume_changes.py; untrusted: tests/reliability/test_r10_untrusted_files.py.
"""

from fairseq_moe.stock.checkpoint import loading, reading, retention, saving, untrusted  # noqa: F401  (declare their seams)
