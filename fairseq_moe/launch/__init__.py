"""How does a name become a running job? Layers of settings become a command, checked; a job; a script; a run.

The command is ``fairseq-moe-launch MODEL key=value ... -- flags of fairseq-train``, or ``python -m
fairseq_moe.launch``. Each question has its file: ``settings`` says which keys there are, ``files`` where recipes lie,
``variables`` what ModelZoo's variables mean, ``layers`` which value counts, ``command`` what is run, ``checks`` and
``flag_checks`` what cannot be, ``resolve`` ties them together. What comes out is a ``job``; ``render`` writes it down
as a text, ``submit`` runs that text or hands the same bytes to SLURM, ``run_directory`` keeps what a run was and
``measured`` what came of it. No shell evaluates a setting.

Tests: tests/unit/launch, tests/e2e/test_recipes.py, tests/e2e/test_scripts_run.py.
"""

__all__: list[str] = []
