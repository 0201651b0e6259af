"""Which memory-bound steps run as one kernel on a GPU?

Each file is one operation: its Triton kernel, its slow twin in plain torch, and a function that takes the kernel where
``launch.runs_triton`` says so and the twin everywhere else. Kernel and twin compute the same values; the kernel reads
each of its inputs once. Nothing here knows a module, a process group or fairseq.

Letters at the end of a name give its shape; a number is an axis of that size:

====== ==========================================================
letter meaning
====== ==========================================================
T      tokens
K      experts chosen per token
R      rows of the experts, sorted by expert
A      assignments: (token, choice) pairs, token by token
L      experts on this rank
D      model width
E      experts of the layer, on all ranks
F      hidden width of an expert
H      outputs of an expert's first matrix: F, or 2F with a gate
I      input width of a matrix
O      output width of a matrix
C      contracted width of a product
N      width of its result
V      vocabulary
====== ==========================================================

Where the host does not know how many rows there are, ``num_rows`` is an int64 scalar on the device, and what stands in
the rows behind it is nobody's: kernels neither use it nor let it reach a result.

Tests: tests/unit/fused, by Triton's interpreter on CPU; on a GPU tests/gpu.
"""
