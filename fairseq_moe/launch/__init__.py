"""How does a name become a running job? Layers of settings become a command, checked, and a job that is ready to write.

The command is ``fairseq-moe-launch MODEL key=value ... -- flags of fairseq-train``, or ``python -m
fairseq_moe.launch``. Each question has its file: ``settings`` says which keys there are, ``files`` where recipes lie,
``variables`` what ModelZoo's variables mean, ``layers`` which value counts, ``command`` what is run, ``checks`` and
``flag_checks`` what cannot be, ``resolve`` ties them together, and ``job`` is what comes out. Nothing is evaluated by a
shell, and nothing here writes a file.

Tests: tests/unit/launch, tests/e2e/test_recipes.py.
"""

__all__: list[str] = []
