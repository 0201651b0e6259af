"""How does stock's trainer save and load an MoE model?"""

from fairseq_moe.stock.checkpoint import loading, reading, retention, saving, untrusted  # noqa: F401  (declare their seams)
