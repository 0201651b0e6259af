"""Run ``fairseq-moe-plan`` as ``python -m fairseq_moe.planner``."""

import sys

from fairseq_moe.planner.command_line import main

if __name__ == "__main__":
    sys.exit(main())
