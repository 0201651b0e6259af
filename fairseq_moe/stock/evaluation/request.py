"""Remember what an evaluation or generation command was asked for, for the seams that run inside it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

__all__ = ["EvaluationRequest", "answering", "current_request"]


@dataclass(kw_only=True)
class EvaluationRequest:
    """Describe one run of fairseq-eval-lm, -validate, -generate or -interactive.

    Args:
        command: ``eval_lm``, ``validate``, ``generate`` or ``interactive``.
        length_given: --tokens-per-sample was given, and did not keep its default.
        skips_too_long: --skip-invalid-size-inputs-valid-test was given.
        context_window: tokens of each block that serve as context only.
        num_tokens: tokens of the text that is evaluated, counted when its blocks were measured.
        has_experts: a model that was loaded has experts.
        num_prompts: prompts that fairseq-interactive has read before the ones at hand.
    """

    command: str
    length_given: bool = False
    skips_too_long: bool = False
    context_window: int = 0
    num_tokens: int = 0
    has_experts: bool = False
    num_prompts: int = 0

    @property
    def scores(self) -> bool:
        """Whether the command prints a loss of a text."""
        return self.command in ("eval_lm", "validate")


_REQUEST: ContextVar[EvaluationRequest | None] = ContextVar("evaluation_request", default=None)


def current_request() -> EvaluationRequest | None:
    """Find the evaluation or generation command that is running; None in training and in a user's own program."""
    return _REQUEST.get()


@contextmanager
def answering(request: EvaluationRequest) -> Iterator[None]:
    """Make ``request`` the current one inside."""
    token = _REQUEST.set(request)
    try:
        yield
    finally:
        _REQUEST.reset(token)
