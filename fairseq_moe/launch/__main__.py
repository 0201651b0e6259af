"""Run ``fairseq-moe-launch`` as ``python -m fairseq_moe.launch``."""

import sys

from fairseq_moe.launch.command_line import main

sys.exit(main())
