"""Run ``python -m fairseq_moe.report``: the command ``fairseq-moe-report``."""

import sys

from fairseq_moe.report.command import main

if __name__ == "__main__":
    sys.exit(main())
