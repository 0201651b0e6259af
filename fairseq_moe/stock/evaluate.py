"""Evaluation and generation: one number over all ranks, no rank left waiting."""

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

from fairseq_moe.distributed import all_reduce_sum, local_experts_only, world_size
from fairseq_moe.stock.find_experts import moe_decoder
from fairseq_moe.stock.seam import seam
from fairseq_moe.stock.start.ending import one_sentence_errors
from fairseq_moe.stock.step.dummy import dummy_batch

logger = logging.getLogger("fairseq_cli.eval_lm")  # where users look for these lines


class _Tally:
    """Count what this rank has scored, by the rules of stock's ``eval_lm``.

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
        self.num_tokens += int(sample["ntokens"])
        self.duration_sec += duration_sec
        for hypo in (best[0] for best in hypos):
            tokens, scores = hypo["tokens"].tolist(), hypo["positional_scores"]
            if self._bos is not None:
                tokens, scores = tokens[1:], scores[1:]
            finite = scores[torch.isfinite(scores)]
            self.score_sum += finite.double().sum().cpu()
            self.num_scored += finite.numel() - sum(token in self._continued for token in tokens[:-1])

    def over_all_ranks(self, device: torch.device) -> tuple[Tensor, int]:
        """Loss per scored token in bits, and the number of tokens put into the model."""
        sums = [self.score_sum.item(), self.num_scored, self.num_tokens]
        score_sum, num_scored, num_tokens = all_reduce_sum(
            torch.tensor(sums, dtype=torch.float64, device=device)
        ).cpu()
        return -score_sum / num_scored / math.log(2), int(num_tokens)


_TALLY: ContextVar[_Tally | None] = ContextVar("evaluation_tally", default=None)


@seam(
    "fairseq_cli.eval_lm:eval_lm",
    signature="(models, source_dictionary, batch_iterator, post_process, output_word_probs, "
    "output_word_stats, target_dictionary, softmax_batch, remove_bos_token, device)",
    stock_does="reports the loss of rank 0's share of the data, and skips a batch where a rank has none",
    breaks="the perplexity of several ranks is that of a part of the text; the ranks that have a batch wait "
    "for ever for the experts of one that has none",
    we_do="sum over all ranks (dense models too); a rank without a batch scores a dummy. One process is "
    "left alone",
    test="tests/e2e/test_commands.py",
)
def eval_lm(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    if world_size() == 1:
        return stock(*args, **kwargs)
    call = inspect.signature(stock).bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    dictionary = given["target_dictionary"] or given["source_dictionary"]
    tally = _Tally(
        bos=dictionary.bos() if given["remove_bos_token"] else None,
        continued=_continued_tokens(given["source_dictionary"], given["post_process"]),
    )
    if any(moe_decoder(model) is not None for model in given["models"]):
        dummy = dummy_batch(dictionary, add_bos_token=given["remove_bos_token"])
        given["batch_iterator"] = _filled(given["batch_iterator"], dummy)
    if given["output_word_probs"] or given["output_word_stats"]:
        logger.warning(
            "words are printed by rank 0 for its own share only; run one process to see all of them."
        )
    with _counting(tally):
        stock(*call.args, **call.kwargs)
    loss, num_tokens = tally.over_all_ranks(next(given["models"][0].parameters()).device)
    logger.info(
        "Evaluated %s tokens in %.1fs (%.2f tokens/s)",
        f"{num_tokens:,}",
        tally.duration_sec,
        num_tokens / max(tally.duration_sec, 1e-9),
    )
    return {"loss": loss, "perplexity": 2**loss}


def _continued_tokens(dictionary: Any, post_process: str | None) -> set[int]:
    if post_process is None:
        return set()
    return {index for index in range(len(dictionary)) if dictionary[index].endswith(post_process.rstrip())}


def _filled(batches: Iterable[Any], dummy: dict[str, Any]) -> Iterator[Any]:
    for sample in batches:
        yield sample if "net_input" in sample else dummy


@contextmanager
def _counting(tally: _Tally) -> Iterator[None]:
    """Collect what is scored inside, and hold back stock's line about this rank's share."""

    def is_not_of_one_rank(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("Evaluated ")

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
    we_do="count along while several ranks evaluate",
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
    "fairseq.checkpoint_utils:load_model_ensemble_and_task",
    signature="(filenames, arg_overrides, task, strict, suffix, num_shards, state)",
    stock_does="returns models and task, which know nothing of each other",
    breaks="the next entry must know whether the task's model has experts",
    we_do="note it on the task",
    test="tests/numerics/test_branch_eval.py",
)
def load_model_ensemble_and_task(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    models, cfg, task = stock(*args, **kwargs)
    task.evaluates_experts = any(moe_decoder(model) is not None for model in models)
    return models, cfg, task


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


@seam(
    "fairseq.hub_utils:from_pretrained",
    signature="(model_name_or_path, checkpoint_file, data_name_or_path, archive_map, **kwargs)",
    stock_does="loads a model for use in this process",
    breaks="inside a process group the experts would be spread over ranks that do not call the model",
    we_do="all experts in this process",
    test="tests/e2e/test_commands.py",
)
def from_pretrained(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with local_experts_only():
        return stock(*args, **kwargs)


@seam(
    "fairseq_cli.generate:main",
    signature="(cfg)",
    stock_does="lets every exception through",
    breaks="a checkpoint that cannot be read ends in a stack trace",
    we_do="end user errors with one sentence, as call_main does for the other commands",
    test="tests/e2e/test_bad_input.py",
)
def generate_main(stock: Callable[..., Any], cfg: Any) -> Any:
    with one_sentence_errors():
        return stock(cfg)
