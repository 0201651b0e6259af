"""What does the script of a job say? Pure functions of a ``Job``: no file, no environment and no clock is read.

``script`` chooses by mode; ``sbatch`` and ``torchrun`` write the two kinds; ``containers`` and ``in_rank`` write what
stands between a launcher and the training command; ``words`` quotes; ``problems`` says what cannot be written down.

Tests: tests/unit/launch, its golden scripts in tests/unit/launch/golden; they run in tests/e2e/test_scripts_run.py.
"""

from fairseq_moe.launch.render.script import render
from fairseq_moe.launch.render.words import command_text, flag_value

__all__ = ["command_text", "flag_value", "render"]
