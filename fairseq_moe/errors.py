"""The exceptions that a user may meet, each one sentence: what, where, expected, found, what to do."""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "MoEError",
    "NonFiniteError",
    "RanksDisagreeError",
    "StockSeamError",
    "TextError",
]


class MoEError(Exception):
    """Base of all errors that end a run with one sentence and a non-zero exit code, without a stack trace.

    Args:
        message: what, where, expected, found, what to do.
        agreed: every rank raises this same error, so rank 0 alone prints it.
    """

    def __init__(self, message: str, *, agreed: bool = False) -> None:
        self.agreed = agreed
        super().__init__(message)


class ConfigError(MoEError, ValueError):
    """Says that flags cannot be honoured; the message lists every problem found.

    Args:
        problems: one sentence per problem.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__(" ".join(problems), agreed=True)


class CheckpointError(MoEError):
    """Says that a checkpoint is missing, unreadable, incomplete, or does not fit the model."""


class StockSeamError(MoEError):
    """Says that the installed fairseq differs from the one that an adapter entry was written for."""


class NonFiniteError(MoEError):
    """Says that losses or gradients that are not finite have kept the run from going on."""


class RanksDisagreeError(MoEError):
    """Says that ranks that must do the same have done different things."""


class TextError(MoEError, FileNotFoundError, ValueError):
    """A text is not there, or is empty; a program that catches what stock raises for either catches this, too."""
