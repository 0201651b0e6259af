"""How are the experts' matrix products computed?

``table`` says which kernel computes them when, and how a further one is added; ``contract`` says what each is given.

Letters at the end of a name give its shape:

====== ==========================================================
letter meaning
====== ==========================================================
L      experts on this rank
R      rows of the experts, sorted by expert: kept (token, choice) pairs
S      rows of the input: tokens, or rows that other ranks sent; without a plan the same as R
D      model width
F      hidden width of an expert
H      outputs of fc1: F, or 2F with a gate
I      input width of one matrix: D of fc1, F of fc2
O      output width of one matrix
C      rows of the busiest expert, to which the others are padded
====== ==========================================================

Tests: tests/unit/modules/test_kernels.py, tests/unit/modules/test_swiglu.py, tests/unit/modules/test_cpu_memory.py.
"""
