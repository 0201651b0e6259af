"""Run ``fairseq-moe-checkpoint`` as ``python -m fairseq_moe.checkpoint_tools``."""

import sys

from fairseq_moe.checkpoint_tools.command import main

if __name__ == "__main__":
    sys.exit(main())
