"""Compare blocks and prompts with the model's positions: no text is left out of a number without a word."""

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from fairseq import utils
from fairseq.data import LMContextWindowDataset
from fairseq.logging import metrics

from fairseq_moe.errors import ConfigError, MoEError
from fairseq_moe.stock.evaluation.request import EvaluationRequest, current_request
from fairseq_moe.stock.seam import seam

__all__ = ["count_validated", "fitting_length", "no_tokens_error", "settle_length"]

logger = logging.getLogger(__name__)

_FLAG = "--tokens-per-sample"
_SKIP = "--skip-invalid-size-inputs-valid-test"


def fitting_length(default: int, *, positions: int, adds_token: bool) -> int:
    """Choose the block length where none was asked for: the default, or what the model has positions for.

    Args:
        default: stock's default, or the length that the model was trained with.
        positions: of the model.
        adds_token: each block is preceded by a beginning token, which takes a position too.
    """
    return default if default <= positions else positions - adds_token


def settle_length(
    request: EvaluationRequest, task: Any, models: list[Any], overrides: Mapping[str, Any]
) -> None:
    """Choose the length of the blocks that ``task`` cuts its text into, before it reads any.

    Args:
        request: what the command was asked for.
        task: of language modelling; its ``args`` are changed.
        models: that will score the text.
        overrides: of the checkpoint's configuration (--model-overrides).

    Raises:
        ConfigError: the length that was given, or the context window, does not fit the models.
    """
    settings = task.args
    # Blocks of one sentence each are not cut; the length is what they are padded to, which capacities go by.
    if getattr(settings, "tokens_per_sample", None) is None or str(settings.sample_break_mode) == "eos":
        return
    positions = int(utils.resolve_max_positions(*[model.max_positions() for model in models]))
    # fairseq-eval-lm has taken the context off by now.
    length = int(settings.tokens_per_sample) + request.context_window
    given = request.length_given
    if not given and overrides.get("tokens_per_sample") is not None:
        length, given = int(overrides["tokens_per_sample"]), True
    if not given:
        adds_token = bool(getattr(settings, "add_bos_token", False))
        chosen = fitting_length(length, positions=positions, adds_token=adds_token)
        if chosen < length:
            logger.info(
                "%s was not given: blocks of %d tokens, which the model has positions for", _FLAG, chosen
            )
        length = chosen
    elif length > positions and not request.skips_too_long:
        raise ConfigError(
            [
                f"{_FLAG} is {length}, but the model has {positions} positions, so that longer blocks could not be "
                f"scored; give at most {positions}, or leave the flag out, or pass {_SKIP} to leave those blocks out."
            ]
        )
    if length <= request.context_window:
        raise ConfigError(
            [
                f"--context-window is {request.context_window}, and blocks have {length} tokens in all; give a "
                "smaller window."
            ]
        )
    settings.tokens_per_sample = length - request.context_window


@seam(
    "fairseq.tasks.fairseq_task:FairseqTask.filter_indices_by_size",
    signature="(self, indices, dataset, max_positions, ignore_invalid_inputs)",
    stock_does="leaves blocks out that are longer than the model's positions, with a warning; where it may not, it "
    "ends in a stack trace",
    breaks="the number that is printed is that of a part of the text; one long prompt ends the session of all",
    we_do="with an MoE model refuse with a sentence, or count what is left out where that was asked for; refuse a "
    "long prompt by itself",
    test="tests/e2e/test_evaluation_length.py",
)
def filter_indices_by_size(
    stock: Callable[..., Any],
    self: Any,
    indices: Any,
    dataset: Any,
    max_positions: Any = None,
    ignore_invalid_inputs: bool = False,
) -> Any:
    request = current_request()
    if request is None or max_positions is None:
        return stock(self, indices, dataset, max_positions, ignore_invalid_inputs)
    _, too_long = dataset.filter_indices_by_size(indices, max_positions)
    if not getattr(self, "evaluates_experts", False):
        kept = stock(self, indices, dataset, max_positions, ignore_invalid_inputs)
        if request.scores and len(too_long) > 0:
            logger.warning(
                _left_out(self, indices, dataset, too_long, max_positions) + " are left out of the number."
            )
        return kept
    if request.scores:
        _check_scored(request, self, indices, dataset, too_long, max_positions)
    elif request.command == "interactive":
        _refuse_prompts(request, dataset, too_long, max_positions)
    elif len(too_long) > 0:
        _check_samples(
            dataset, too_long, max_positions, may_skip=ignore_invalid_inputs and len(too_long) < len(indices)
        )
    return stock(self, indices, dataset, max_positions, True)


def _check_scored(
    request: EvaluationRequest, task: Any, indices: Any, dataset: Any, too_long: Any, positions: int
) -> None:
    """Count the tokens to score, and refuse to leave any out unless that was asked for."""
    request.num_tokens = _num_tokens(task, dataset, indices)
    if len(too_long) > 0 and not request.skips_too_long:
        longest = max(_length(dataset, index) for index in too_long)
        raise ConfigError(
            [
                f"{_left_out(task, indices, dataset, too_long, positions)} (the longest has {longest}) and could not "
                f"be scored; cut the text into blocks that fit (--sample-break-mode none {_FLAG} {positions}), or "
                f"pass {_SKIP} to leave those blocks out."
            ]
        )
    if len(too_long) == len(indices):
        raise no_tokens_error(request, f"the model's {positions} positions are fewer than any block's tokens")


def no_tokens_error(request: EvaluationRequest, why: str) -> MoEError:
    """Build the error of an evaluation that has scored nothing, and so has no number to print."""
    sentence = f"0 of {request.num_tokens:,} tokens were scored ({why}), so there is no number to print"
    return MoEError(f"{sentence}; choose another split, or shorter blocks ({_FLAG}).", agreed=True)


def _left_out(task: Any, indices: Any, dataset: Any, too_long: Any, positions: int) -> str:
    """Say how many tokens stand in blocks that are too long: the beginning of a sentence."""
    part, whole = _num_tokens(task, dataset, too_long), _num_tokens(task, dataset, indices)
    return f"{part:,} of {whole:,} tokens stand in blocks longer than the model's {positions} positions"


def _num_tokens(task: Any, dataset: Any, indices: Any) -> int:
    """Count the tokens of these blocks as stock's commands do: with the beginning token that precedes each."""
    if len(indices) == 0:
        return 0
    blocks = dataset.dataset if isinstance(dataset, LMContextWindowDataset) else dataset
    sizes = blocks.num_tokens_vec(np.asarray(indices, dtype=np.int64))
    adds_token = bool(getattr(task.args, "add_bos_token", False))
    return int(sizes.sum()) + adds_token * len(indices)


def _length(dataset: Any, index: int) -> int:
    """Measure a block or prompt as stock compares it with the positions."""
    return int(np.max(dataset.size(index)))


def _check_samples(dataset: Any, too_long: Any, positions: int, *, may_skip: bool) -> None:
    """Refuse to generate from samples that are too long, unless leaving them out was asked for and leaves any."""
    if may_skip:
        return
    first = too_long[0]
    raise MoEError(
        f"sample {first} has {_length(dataset, first)} tokens, and the model has {positions} positions; pass {_SKIP} "
        f"to answer those that fit, if there are any, or cut the text into shorter samples ({_FLAG}, "
        "--sample-break-mode).",
        agreed=True,
    )


def _refuse_prompts(request: EvaluationRequest, dataset: Any, too_long: Any, positions: int) -> None:
    """Say which prompts are not answered, under the numbers that the answers carry."""
    for index in sorted(int(index) for index in too_long):
        print(
            f"fairseq_moe: error: prompt {request.num_prompts + index} has {_length(dataset, index)} tokens, its end "
            f"mark included, and the model has {positions} positions; it is not answered.",
            file=sys.stderr,
            flush=True,
        )
    request.num_prompts += len(dataset)


def count_validated(request: EvaluationRequest, task: Any) -> None:
    """Let ``task.reduce_metrics`` refuse a number of no tokens, and say how many were scored if some may be left out.

    fairseq-validate calls it once per subset, with the outputs of all ranks.
    """
    reduce_all = task.reduce_metrics

    def reduce_metrics(logging_outputs: list[dict[str, Any]], criterion: Any) -> None:
        num_scored = int(sum(log.get("ntokens", 0) for log in logging_outputs))
        if num_scored == 0:
            raise no_tokens_error(request, "there are no batches of it")
        reduce_all(logging_outputs, criterion)
        if request.skips_too_long:
            said = f"{num_scored:,} of {request.num_tokens:,}"
            metrics.log_derived("scored_tokens", lambda meters: said)

    task.reduce_metrics = reduce_metrics
