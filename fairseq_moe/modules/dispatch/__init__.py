"""How do rows reach the experts and come back?

A *row* is a (token, choice) pair that was kept. ``dispatcher`` says what a dispatcher is, ``rows`` lists rows and adds
up their results, ``exchange`` says what is asked of other ranks.

Letters at the end of a name give its shape; a number is an axis of that size:

====== ===================================================
letter meaning
====== ==========================================================
T      tokens of this rank (batch x sequence, batch-major)
K      experts chosen per token
A      assignments: (token, choice) pairs, token by token
R      rows: assignments that were kept, expert by expert
S      source of the experts' rows: tokens, or rows that other ranks sent
D      model width
E      experts of the layer, on all ranks
L      experts on this rank
G      ranks that exchange rows
====== ==========================================================

Tests: tests/unit/modules/test_dispatchers.py, tests/unit/modules/test_rows.py,
tests/unit/modules/test_expert_work.py; on ranks: tests/distributed/test_uneven_batches.py,
tests/reliability/test_r15_no_tokens.py.
"""
