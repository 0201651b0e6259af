"""Be a model of lm-evaluation-harness: score continuations and texts, and answer prompts."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from fairseq_moe.errors import ConfigError, MoEError
from fairseq_moe.evaluation_harness.generation import continue_greedily
from fairseq_moe.evaluation_harness.loading import load_model

__all__ = ["FairseqMoELM"]

logger = logging.getLogger(__name__)

_NUM_NEW = 256  # of a task that does not say how many; as the harness's own models
_UNDERSTOOD = {"do_sample", "max_gen_toks", "temperature", "until"}
_OF_NO_EFFECT = {"top_k", "top_p"}  # without sampling
Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("fairseq_moe")
class FairseqMoELM(TemplateLM):
    """Score and generate with a checkpoint of fairseq_moe, in one process.

    Args:
        path: a directory that from-hf made, or a checkpoint's .pt file.
        data: directory with dict.txt, if it is not beside the checkpoint.
        tokenizer: tokenizer.json of a converted model, if it is not in hf beside the checkpoint.
        add_bos_token: begin every prompt with the beginning token; None: as the model was trained.
        max_length: tokens to read at once; None: as many as the model has positions for.
        batch_size: requests that go through the model together.
        device: as torch names it; None: a GPU. Without one it is the CPU, because the harness asks for a GPU by itself.
        overrides: settings of the checkpoint's configuration to replace.

    Raises:
        MoEError: a file is missing or cannot be read.
        ConfigError: a setting is not understood.
    """

    def __init__(
        self,
        path: str,
        data: str | None = None,
        tokenizer: str | None = None,
        add_bos_token: bool | None = None,
        max_length: int | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__()
        self._batch_size = _number(batch_size, overrides.pop("max_batch_size", None))
        loaded = load_model(
            Path(path),
            data=None if data is None else Path(data),
            tokenizer=None if tokenizer is None else Path(tokenizer),
            overrides=overrides,
        )
        if max_length is not None and not 1 <= max_length <= loaded.positions:
            raise ConfigError(
                [f"max_length is {max_length}, and the model has {loaded.positions} positions."]
            )
        self._device = _present(torch.device(device or "cuda"))
        self._model = loaded.model.to(self._device)
        self._text = loaded.text
        self._begins = loaded.text.begins if add_bos_token is None else add_bos_token
        self._padding = loaded.padding
        self.max_length = max_length or loaded.positions

    @property
    def eot_token_id(self) -> int:
        """Name the token that ends a text."""
        return self._text.end

    @property
    def prefix_token_id(self) -> int:
        """Name the token that a text without a context is scored behind."""
        return self._text.beginning

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encode text, behind the beginning token if prompts have one and the text does not show it already."""
        ids = self._text.encode(string)
        begins = self._begins if add_special_tokens is None else add_special_tokens
        return [self._text.beginning, *ids] if begins and ids[:1] != [self._text.beginning] else ids

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, each token once, behind the beginning token and as much of the text as fits."""
        windows: list[Request] = []
        counts = []
        for (text,) in (request.args for request in requests):
            pairs = get_rolling_token_windows(
                self._text.encode(text), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            of_text = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += of_text
            counts.append(len(of_text))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        sums = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, found in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found)
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations: (sum of log-probabilities in nats, whether each token is the likeliest)."""
        lengths = [len(context) + len(continuation) - 1 for _, context, continuation in requests]
        longest = max((len(continuation) for *_, continuation in requests), default=0)
        if longest > self.max_length:
            raise MoEError(
                f"a continuation has {longest} tokens, and the model reads {self.max_length} at once."
            )
        self._say_what_is_cut(lengths, self.max_length)
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="scoring") as bar:
            for batch in self._batches(lengths):
                rows = [requests[index] for index in batch]
                for index, found in zip(batch, self._score(rows), strict=True):
                    results[index] = found
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], found)
                bar.update(len(batch))
        return results

    @torch.no_grad()
    def _score(self, rows: Sequence[Request]) -> list[tuple[float, bool]]:
        ids = [torch.tensor([*context, *more][-self.max_length - 1 :]) for _, context, more in rows]
        inputs = pad_sequence([row[:-1] for row in ids], batch_first=True, padding_value=self._padding)
        output = self._model(inputs.to(self._device))
        logs = self._model.get_normalized_probs(output, log_probs=True)  # (B, S, V)
        found = []
        for row, (_, _, continuation), of_row in zip(ids, rows, logs, strict=True):
            last = len(row) - 1
            of_words = of_row[last - len(continuation) : last]
            words = row[len(row) - len(continuation) :].to(self._device)
            score = of_words.gather(1, words[:, None]).double().sum()
            found.append((float(score), bool((of_words.argmax(dim=1) == words).all())))
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Answer prompts greedily, up to the first of a task's stop sequences or the end token."""
        results = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generating") as bar:
            for members in groups.values():
                wanted = requests[members[0]].args[1]
                stops, num_new = self._understood(wanted)
                room = self.max_length - num_new
                prompts = [self.tok_encode(requests[index].args[0]) for index in members]
                self._say_what_is_cut([len(prompt) for prompt in prompts], room)
                for batch in self._batches([len(prompt) for prompt in prompts]):
                    texts = self._answer([prompts[member][-room:] for member in batch], stops, num_new)
                    for member, text in zip(batch, texts, strict=True):
                        results[members[member]] = text
                        self.cache_hook.add_partial("generate_until", requests[members[member]].args, text)
                    bar.update(len(batch))
        return results

    def _answer(self, prompts: Sequence[list[int]], stops: list[str], num_new: int) -> list[str]:
        def is_done(ids: list[int]) -> bool:
            text = self._text.decode(ids)
            return any(stop in text for stop in stops if stop)

        # A prompt may be empty: the model then begins a text.
        begun = [prompt or [self.prefix_token_id] for prompt in prompts]
        found = continue_greedily(
            self._model.decoder, begun, num_new=num_new, end=self.eot_token_id, is_done=is_done
        )
        return [postprocess_generated_text(self._text.decode(ids), stops, None) for ids in found]

    def _understood(self, wanted: dict[str, Any]) -> tuple[list[str], int]:
        """Read a task's settings of generation as (stop sequences, new tokens at most)."""
        settings = normalize_gen_kwargs(wanted, _NUM_NEW)
        problems = [
            f"the task's setting {key}={value!r} is not understood; set it to nothing with --gen_kwargs."
            for key, value in settings.items()
            if key not in _UNDERSTOOD | _OF_NO_EFFECT
        ]
        if settings["do_sample"]:
            problems.append("answers are not drawn at random here; pass --gen_kwargs do_sample=False.")
        num_new = settings["max_gen_toks"]
        if not 1 <= num_new < self.max_length:
            problems.append(
                f"the task asks for {num_new} new tokens, and the model reads {self.max_length} at once; pass "
                "--gen_kwargs max_gen_toks=N."
            )
        if problems:
            raise ConfigError(problems)
        return handle_stop_sequences(settings.get("until"), self._text.word(self.eot_token_id)), num_new

    def _say_what_is_cut(self, lengths: Sequence[int], room: int) -> None:
        num_cut = sum(length > room for length in lengths)
        if num_cut:
            logger.warning(
                "%d of %d requests have more than the %d tokens that fit (the longest has %d): their beginnings are "
                "left out.",
                num_cut,
                len(lengths),
                room,
                max(lengths),
            )

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Make batches of requests of like length, the longest first, so that memory runs out at once if it does."""
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        for first in range(0, len(order), self._batch_size):
            yield order[first : first + self._batch_size]


def _number(batch_size: int | str, max_batch_size: int | None) -> int:
    text = str(batch_size)
    if not text.isdecimal() or int(text) < 1 or max_batch_size is not None:
        raise ConfigError([f"batch_size is {text}, expected a number from 1 up, and no max_batch_size."])
    return int(text)


def _present(device: torch.device) -> torch.device:
    if device.type == "cuda" and not torch.cuda.is_available():
        logger.info("there is no GPU here: the CPU computes instead of %s.", device)
        return torch.device("cpu")
    return device
