"""What model do the flags ask for? fairseq's decoder with experts and blocks of ours; fairseq imports every file here.

Letters at the end of a name give its shape; stock's own order (S, B, D) has none:

====== ==========================================================
letter meaning
====== ==========================================================
B      sequences of a batch
S      positions of a sequence
T      tokens: B x S, batch-major; in ``padding_BT``, which attention takes, earlier and new positions
D      model width
E      experts of a layer
H      heads
d      width of a head
====== ==========================================================

In docstrings V is the size of the vocabulary, F the hidden width of a network and K the experts per token.

Tests: tests/unit/models, tests/distributed/test_decoder.py, tests/distributed/test_blocks.py; attention:
tests/unit/models/test_attention.py; whole models: tests/numerics/test_families_against_transformers.py.
"""
