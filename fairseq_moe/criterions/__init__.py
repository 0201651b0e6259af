"""What is an MoE model's loss, and what is logged? Cross entropy, balance losses, and statistics of the layers.

Letters at the end of a name give its shape:

====== ==========================================================
letter meaning
====== ==========================================================
B      sequences of a batch
S      positions of a sequence
T      tokens: B x S, batch-major
V      words of the vocabulary
E      experts of a layer
L      layers with experts
N      ranks that have other words of the same positions
====== ==========================================================

Tests: tests/unit/criterions, tests/distributed/test_vocabulary_nll.py, tests/e2e/test_training.py.
"""

from fairseq_moe.criterions.moe_cross_entropy import MoECrossEntropyCriterion

__all__ = ["MoECrossEntropyCriterion"]
