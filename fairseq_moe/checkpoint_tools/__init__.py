"""What can be done with a checkpoint outside a run? It can be inspected, verified, averaged, copied, made dense.

The command is ``fairseq-moe-checkpoint TOOL PATH ...``, or ``python -m fairseq_moe.checkpoint_tools``.
``checkpoint`` answers what the files are that the tools read and write, ``stock/checkpoint`` how stock's trainer saves
and loads them.

One process, no process group: a tool opens a checkpoint of any kind (``source``: ours, the moe branch's, stock's dense
ones), compares it with its digests, and streams it, tensor by tensor, into a new one. What is written appears at once
and complete, or not at all, and nothing is ever overwritten.

Tests: tests/unit/checkpoint_tools, tests/e2e/test_checkpoint_tools.py.
"""

__all__: list[str] = []
