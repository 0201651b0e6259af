"""Find out which versions of what, and which commit, a run is made with."""

import platform
import subprocess
from pathlib import Path

__all__ = ["versions"]

_PACKAGE = Path(__file__).resolve().parents[1]


def versions() -> dict[str, str | None]:
    """Name versions by package; ``cuda`` is what torch was built for, ``commit`` that of a checkout, or None."""
    import fairseq
    import numpy
    import torch

    import fairseq_moe

    return {
        "fairseq_moe": fairseq_moe.__version__,
        "commit": _commit(),
        "fairseq": fairseq.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
    }


def _commit() -> str | None:
    """Find the commit of the checkout that holds this package, ``-dirty`` after it where files have changed since."""
    # Another project's repository may lie around an installed package.
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git("rev-parse", "HEAD")
    return (
        f"{commit}-dirty" if commit and _git("status", "--porcelain", "--untracked-files=no", ".") else commit
    )


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(
            ["git", "-C", str(_PACKAGE), *arguments], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()
