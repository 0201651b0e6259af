"""How does stock's trainer save and load an MoE model?

``checkpoint`` answers what the files are that it writes and reads, without fairseq and without other ranks;
``checkpoint_tools`` what one can do with them from the command line.
"""

from fairseq_moe.stock.checkpoint import loading, reading, retention, saving, untrusted  # noqa: F401  (declare their seams)
