"""What else is a decoder layer made of? Norms, rotary positions, grouped and latent attention.

Letters at the end of a name give its shape; small ones are widths within a head:

====== ==========================================================
letter meaning
====== ==========================================================
B      sequences of a batch
S      new positions: those of the queries
T      earlier and new positions: those of the keys
P      positions that a table of cosines and sines covers
D      model width
H      query heads
G      key and value heads, a divisor of H
N      width of all heads side by side
d      width of a head's queries and keys
e      width of a head's values
p      part of d that carries no positions (latent attention)
t      part of d that turns with the position (latent attention)
f      pairs of values that turn together: half of what turns of a head
r      width of the latent vector of keys and values
====== ==========================================================

Tests: tests/unit/models/test_attention.py, tests/numerics/test_blocks_against_transformers.py.
"""
