"""Which token goes to which expert, with which weight, and what does balance cost?

``router`` computes logits and hands them to a rule, ``topk`` (its common case on a GPU is ``one_kernel``) or
``branch``; ``contract`` says what a rule takes and gives.

Letters at the end of a name give its shape; a number is an axis of that size:

====== ==========================================================
letter meaning
====== ==========================================================
T      tokens of this rank (batch x sequence, batch-major)
B      sequences of the batch
S      positions of a sequence
D      model width
E      experts of the layer, on all ranks
K      experts chosen per token
A      assignments: (token, choice) pairs, token by token
C      slots of one expert
L      layers of the model
R      ranks that have tokens of the same micro-batch
====== ==========================================================

Tests: tests/unit/modules/test_branch.py, tests/unit/modules/test_topk.py, tests/unit/modules/test_router.py,
tests/unit/modules/test_one_kernel.py, tests/unit/modules/test_losses.py, tests/unit/modules/test_stats.py,
tests/unit/modules/test_micro_batch.py, tests/distributed/test_shard_losses.py, tests/distributed/test_shard_counts.py,
tests/numerics/test_gate_against_masks.py, tests/numerics/test_routing_fixtures.py.
"""
