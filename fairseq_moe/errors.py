"""The exceptions that a user may meet, each carrying one sentence: what, where, expected, found, what to do."""

__all__ = ["CheckpointError", "ConfigError", "MoEError", "StockSeamError"]


class MoEError(Exception):
    """Base of all errors that end a run with one sentence and a non-zero exit code, without a stack trace."""


class ConfigError(MoEError, ValueError):
    """The flags cannot be honoured; the message lists every problem found.

    Args:
        problems: one sentence per problem.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__(" ".join(problems))


class CheckpointError(MoEError):
    """A checkpoint is missing, unreadable, incomplete, or does not fit the model."""


class StockSeamError(MoEError):
    """The installed fairseq differs from the one that an adapter entry was written for."""
