"""``python -m fairseq_moe.convert``."""

import sys

from fairseq_moe.convert.cli import main

if __name__ == "__main__":
    sys.exit(main())
