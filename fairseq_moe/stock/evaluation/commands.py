"""Note what the evaluation and generation commands are asked for, and end their user errors with one sentence."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks.language_modeling import LanguageModelingConfig

from fairseq_moe.errors import MoEError
from fairseq_moe.stock.evaluation.request import EvaluationRequest, answering
from fairseq_moe.stock.seam import seam
from fairseq_moe.stock.start.ending import one_sentence_errors
from fairseq_moe.stock.start.given import flag_is_given
from fairseq_moe.stock.start.log_format import use_stock_log_format

_NO_DATA = "Dataset not found"  # how stock's message begins
_DEFAULT_LENGTH = LanguageModelingConfig.tokens_per_sample


@seam(
    "fairseq_cli.eval_lm:main",
    signature="(cfg, **unused_kwargs)",
    stock_does="does not tell a --tokens-per-sample that was given from its default",
    breaks="the default is longer than most models' positions; all blocks are skipped, and the perplexity is 1.00",
    we_do="note what was asked for, for the seams that cut and measure the blocks",
    test="tests/e2e/test_evaluation_length.py",
)
def eval_lm_main(stock: Callable[..., Any], cfg: Any, **kwargs: Any) -> Any:
    cfg = _composed(cfg)
    request = _request_of("eval_lm", cfg)
    request.context_window = int(cfg.eval_lm.context_window)
    length = getattr(cfg.task, "tokens_per_sample", None)
    request.length_given = flag_is_given("tokens_per_sample", differs=length != _DEFAULT_LENGTH)
    with answering(request), _missing_data_named(request):
        return stock(cfg, **kwargs)


@seam(
    "fairseq_cli.validate:main",
    signature="(cfg, override_args)",
    stock_does="as fairseq_cli.eval_lm:main; ends in a stack trace where a checkpoint names no criterion",
    breaks="as fairseq_cli.eval_lm:main; a converted model cannot be validated",
    we_do="as fairseq_cli.eval_lm:main; moe_cross_entropy where no criterion is named",
    test="tests/e2e/test_evaluation_length.py",
)
def validate_main(stock: Callable[..., Any], cfg: Any, override_args: Any = None) -> Any:
    cfg = _composed(cfg)
    request = _request_of("validate", cfg)
    with answering(request), _missing_data_named(request):
        return stock(cfg, override_args)


@seam(
    "fairseq_cli.interactive:main",
    signature="(cfg)",
    stock_does="ends at a prompt that is longer than the model's positions",
    breaks="one long prompt ends the session of all",
    we_do="note that prompts are being answered, for the seam that measures them",
    test="tests/e2e/test_prompts.py",
)
def interactive_main(stock: Callable[..., Any], cfg: Any) -> Any:
    cfg = _composed(cfg)
    with answering(_request_of("interactive", cfg)):
        return stock(cfg)


@seam(
    "fairseq_cli.generate:main",
    signature="(cfg)",
    stock_does="lets every exception through",
    breaks="a checkpoint that cannot be read ends in a stack trace",
    we_do="end user errors with one sentence, as call_main does for the other commands",
    test="tests/e2e/test_bad_input.py",
)
def generate_main(stock: Callable[..., Any], cfg: Any) -> Any:
    use_stock_log_format()
    with one_sentence_errors():
        cfg = _composed(cfg)
        request = _request_of("generate", cfg)
        with answering(request), _missing_data_named(request):
            return stock(cfg)


def _composed(cfg: Any) -> Any:
    """Turn the namespace that some callers of stock's commands pass into a configuration."""
    return convert_namespace_to_omegaconf(cfg) if isinstance(cfg, Namespace) else cfg


def _request_of(command: str, cfg: Any) -> EvaluationRequest:
    """Read from a configuration what all of the commands are asked for."""
    skips = bool(cfg.dataset.skip_invalid_size_inputs_valid_test)
    return EvaluationRequest(command=command, skips_too_long=skips)


@contextmanager
def _missing_data_named(request: EvaluationRequest) -> Iterator[None]:
    """Turn stock's exception about a data set that is not there into a sentence, where a model has experts."""
    try:
        yield
    except FileNotFoundError as error:
        if not request.has_experts or not str(error).startswith(_NO_DATA):
            raise
        raise MoEError(
            f"{error}: there is no .idx and .bin file of that name; correct the data directory or the split, or "
            "binarise text with fairseq-preprocess --only-source (of a converted model: fairseq-moe-convert "
            "preprocess)."
        ) from error
