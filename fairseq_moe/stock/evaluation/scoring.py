"""Sum the scores of fairseq-eval-lm over all ranks, and refuse to print a number of no tokens."""

import inspect
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from fairseq_moe.distributed import all_reduce_sum, world_size
from fairseq_moe.stock.evaluation.lengths import no_tokens_error
from fairseq_moe.stock.evaluation.request import EvaluationRequest, current_request
from fairseq_moe.stock.find_experts import moe_decoder
from fairseq_moe.stock.seam import seam
from fairseq_moe.stock.step.dummy import dummy_batch

logger = logging.getLogger("fairseq_cli.eval_lm")  # where users look for these lines


class _Tally:
    """Count and add up what this rank has scored, by the rules of stock's ``eval_lm``.

    Args:
        bos: the token to leave out at the start of each sentence, or None.
        continued: tokens whose score counts with that of the next token (--post-process).
    """

    def __init__(self, *, bos: int | None, continued: set[int]) -> None:
        self._bos = bos
        self._continued = continued
        self.score_sum = torch.zeros((), dtype=torch.float64)
        self.num_scored = 0
        self.num_tokens = 0
        self.duration_sec = 0.0

    def add(self, sample: dict[str, Any], hypos: list[Any], duration_sec: float) -> None:
        """Add the best hypothesis of each sentence of a batch."""
        self.num_tokens += int(sample["ntokens"])
        self.duration_sec += duration_sec
        for hypo in (best[0] for best in hypos):
            tokens, scores = hypo["tokens"].tolist() if self._continued else [], hypo["positional_scores"]
            if self._bos is not None:
                tokens, scores = tokens[1:], scores[1:]
            finite = scores[torch.isfinite(scores)]
            self.score_sum += finite.double().sum().cpu()
            self.num_scored += finite.numel() - sum(token in self._continued for token in tokens[:-1])

    def add_other_ranks(self, device: torch.device) -> None:
        """Add what the other ranks have scored; every rank calls this."""
        sums = torch.tensor([self.score_sum.item(), self.num_scored, self.num_tokens], dtype=torch.float64)
        self.score_sum, num_scored, num_tokens = all_reduce_sum(sums.to(device)).cpu()
        self.num_scored, self.num_tokens = int(num_scored), int(num_tokens)

    def loss_bits(self) -> Tensor | float:
        """Loss per scored token in bits; 0 where none was, as in stock."""
        return -self.score_sum / self.num_scored / math.log(2) if self.num_scored else 0.0


_TALLY: ContextVar[_Tally | None] = ContextVar("evaluation_tally", default=None)


@seam(
    "fairseq_cli.eval_lm:eval_lm",
    signature="(models, source_dictionary, batch_iterator, post_process, output_word_probs, "
    "output_word_stats, target_dictionary, softmax_batch, remove_bos_token, device)",
    stock_does="reports the loss of rank 0's share of the data, and skips a batch where a rank has none",
    breaks="the perplexity of several ranks is that of a part of the text; the ranks that have a batch wait "
    "for ever for the experts of one that has none",
    we_do="sum over all ranks (dense models too); a rank without a batch scores a dummy; nothing scored is an "
    "error, and where blocks may be left out the line says of how many tokens the number is. One process with a "
    "dense model is left alone",
    test="tests/e2e/test_commands.py",
)
def eval_lm(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    call = inspect.signature(stock).bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    has_experts, is_alone = (
        any(moe_decoder(model) is not None for model in given["models"]),
        world_size() == 1,
    )
    if is_alone and not has_experts:
        return stock(*args, **kwargs)
    dictionary = given["target_dictionary"] or given["source_dictionary"]
    tally = _Tally(
        bos=dictionary.bos() if given["remove_bos_token"] else None,
        continued=_continued_tokens(given["source_dictionary"], given["post_process"]),
    )
    request = current_request() or EvaluationRequest(command="eval_lm")
    if is_alone:
        with _counting(tally, says_itself=request.skips_too_long):
            results = stock(*args, **kwargs)
    else:
        _score_on_several_ranks(stock, call, tally, has_experts=has_experts)
        results = {"loss": tally.loss_bits(), "perplexity": 2 ** tally.loss_bits()}
    if has_experts and tally.num_scored == 0:
        raise no_tokens_error(request, "no token got a finite score")
    if request.skips_too_long or not is_alone:
        _log_speed(tally, request if has_experts else None)
    return results


def _score_on_several_ranks(
    stock: Callable[..., Any], call: inspect.BoundArguments, tally: _Tally, *, has_experts: bool
) -> None:
    """Score this rank's share of the text, in step with the other ranks, and add up what all have scored."""
    given = call.arguments
    if has_experts:
        dictionary = given["target_dictionary"] or given["source_dictionary"]
        dummy = dummy_batch(dictionary, add_bos_token=given["remove_bos_token"])
        given["batch_iterator"] = _filled(given["batch_iterator"], dummy)
    if given["output_word_probs"] or given["output_word_stats"]:
        logger.warning(
            "words are printed by rank 0 for its own share only; run one process to see all of them."
        )
    with _counting(tally, says_itself=True):
        stock(*call.args, **call.kwargs)
    tally.add_other_ranks(next(given["models"][0].parameters()).device)


def _log_speed(tally: _Tally, request: EvaluationRequest | None) -> None:
    """Print stock's line; where blocks may have been left out, with the number of all tokens."""
    whole = f" of {request.num_tokens:,}" if request is not None and request.skips_too_long else ""
    logger.info(
        "Evaluated %s%s tokens in %.1fs (%.2f tokens/s)",
        f"{tally.num_tokens:,}",
        whole,
        tally.duration_sec,
        tally.num_tokens / max(tally.duration_sec, 1e-9),
    )


def _continued_tokens(dictionary: Any, post_process: str | None) -> set[int]:
    """Tokens that a word goes on after."""
    if post_process is None:
        return set()
    return {index for index in range(len(dictionary)) if dictionary[index].endswith(post_process.rstrip())}


def _filled(batches: Iterable[Any], dummy: dict[str, Any]) -> Iterator[Any]:
    """Put a dummy in the place of each empty batch."""
    for sample in batches:
        yield sample if "net_input" in sample else dummy


@contextmanager
def _counting(tally: _Tally, *, says_itself: bool) -> Iterator[None]:
    """Collect what is scored inside.

    Args:
        tally: takes it.
        says_itself: hold back stock's line about the tokens; the caller prints one about all of them.
    """

    def is_not_of_one_rank(record: logging.LogRecord) -> bool:
        return not (says_itself and str(record.msg).startswith("Evaluated "))

    token = _TALLY.set(tally)
    logger.addFilter(is_not_of_one_rank)
    try:
        yield
    finally:
        logger.removeFilter(is_not_of_one_rank)
        _TALLY.reset(token)


@seam(
    "fairseq.sequence_scorer:SequenceScorer.generate",
    signature="(self, models, sample, **kwargs)",
    stock_does="hands the scores to eval_lm, which keeps their sum and count to itself",
    breaks="they cannot be summed over ranks",
    we_do="count along while an MoE model or several ranks evaluate",
    test="tests/e2e/test_commands.py",
)
def scorer_generate(stock: Callable[..., Any], self: Any, models: Any, sample: Any, **kwargs: Any) -> Any:
    start_sec = time.perf_counter()
    hypos = stock(self, models, sample, **kwargs)
    tally = _TALLY.get()
    if tally is not None:
        tally.add(sample, hypos, time.perf_counter() - start_sec)
    return hypos


@seam(
    "fairseq.tasks.language_modeling:LanguageModelingTask.eval_lm_dataloader",
    signature="(self, dataset, max_tokens, batch_size, max_positions, num_shards, shard_id, num_workers, "
    "data_buffer_size, context_window)",
    stock_does="leaves blocks at their own length",
    breaks="the capacity of an expert is a share of a batch's tokens, so a short last block drops other "
    "tokens than in the branch, which pads all blocks to --tokens-per-sample",
    we_do="pad them too when the model has experts",
    test="tests/numerics/test_branch_eval.py",
)
def eval_lm_dataloader(stock: Callable[..., Any], self: Any, dataset: Any, *args: Any, **kwargs: Any) -> Any:
    if getattr(self, "evaluates_experts", False):
        dataset.fixed_pad_length = self.args.tokens_per_sample
    return stock(self, dataset, *args, **kwargs)
