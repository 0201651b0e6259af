"""How is the load spread over the experts? The record on disk, its watch, summary, table and plot.

Letters at the end of a name give its shape:

====== ==========================================================
letter meaning
====== ==========================================================
N      layers with experts
E      experts of a layer
====== ==========================================================

Tests: tests/unit/expert_load; watch: tests/reliability/test_r14_one_expert_takes_all.py.
"""
