"""How does a name become a running job? What is to run is a ``Job``, written down as a script, then run or submitted.

``job`` is what comes out of settings, ``render`` writes it down as a text, ``submit`` runs that text or hands the same
bytes to SLURM, ``run_directory`` keeps what a run was and ``measured`` what came of it.

Tests: tests/unit/launch, tests/e2e/test_scripts_run.py.
"""

__all__: list[str] = []
