"""``python -m fairseq_moe.evaluation_harness --model fairseq_moe ...``: the command ``lm_eval`` with this model."""

import sys

from fairseq_moe.errors import MoEError

__all__ = ["main"]


def main() -> int:
    """Run the harness's own command; its arguments are this process's.

    Returns:
        Exit code: 0; 2 after an error, which is one sentence on stderr.
    """
    try:
        from lm_eval.__main__ import cli_evaluate

        from fairseq_moe.evaluation_harness import model  # noqa: F401  (registers itself)
    except ImportError as error:
        print(
            f"fairseq_moe: error: this needs the extra eval: pip install 'fairseq_moe[eval]' ({error})",
            file=sys.stderr,
        )
        return 2
    try:
        cli_evaluate()
    except MoEError as error:
        print(f"fairseq_moe: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
