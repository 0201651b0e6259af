"""Command lines and small library changes: what stock parses wrongly, --user-dir, and NumPy 2."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import fairseq_moe
from fairseq_moe.stock.proxy import ModuleProxy
from fairseq_moe.stock.seam import install_seams, seam
from fairseq_moe.stock.start.ending import one_sentence_errors
from fairseq_moe.stock.start.given import note_given
from fairseq_moe.stock.start.other_models import refuse_flags_of_other_models


@seam(
    "fairseq.options:parse_args_and_arch",
    signature="(parser, input_args, parse_known, suppress_defaults, modify_parser)",
    stock_does="takes --bf16 for a TPU run, also on GPUs and CPUs, and knows no --is-moe; calls a flag of ours "
    "unrecognised where --arch is another model than transformer_lm",
    breaks="--bf16 ends in an XLA error; the branch's evaluation commands do not parse; nobody learns why there are "
    "no experts",
    we_do="bf16 without TPU unless --tpu is given; --is-moe is accepted where a model is loaded (it is not "
    "needed: checkpoints say what they are); say which architectures have our flags",
    test="tests/e2e/test_commands.py",
)
def parse_args_and_arch(
    stock: Callable[..., Any],
    parser: argparse.ArgumentParser,
    input_args: list[str] | None = None,
    parse_known: bool = False,
    suppress_defaults: bool = False,
    modify_parser: Callable[..., Any] | None = None,
) -> Any:
    options = parser._option_string_actions
    if "--path" in options and "--is-moe" not in options:
        parser.add_argument("--is-moe", action="store_true", help="accepted and unnecessary")
    given = sys.argv[1:] if input_args is None else input_args
    with one_sentence_errors():
        refuse_flags_of_other_models(parser, given)
    parsed = stock(parser, input_args, parse_known, suppress_defaults, modify_parser)
    args = parsed[0] if parse_known else parsed
    note_given(parser, input_args)
    if getattr(args, "bf16", False) and "--tpu" not in given:
        args.tpu = False
    return parsed


@seam(
    "fairseq.utils:import_user_module",
    signature="(args)",
    stock_does="accepts a package that is imported already only under the spelling of the path it was "
    "imported by, and looks for a plain name in the working directory and next to fairseq only",
    breaks="--user-dir fairseq_moe fails after an import of the package, and in the directory that hydra "
    "changes to",
    we_do="take every spelling of this package's own directory, and its plain name, as imported; then "
    "change the command that is running, whose module may have been imported after this package",
    test="tests/e2e/test_launch.py",
)
def import_user_module(stock: Callable[..., Any], args: Any) -> None:
    user_dir = getattr(args, "user_dir", None)
    if user_dir is None or not _is_this_package(user_dir):
        stock(args)
    install_seams()


def _is_this_package(user_dir: str) -> bool:
    (package,) = map(os.path.abspath, fairseq_moe.__path__)
    if os.path.exists(user_dir):
        return os.path.samefile(user_dir, package)
    return user_dir == os.path.basename(package)


@seam(
    "fairseq.data.token_block_dataset:np",
    signature=None,
    stock_does="uses np.compat.long, which NumPy 2 does not have",
    breaks="--sample-break-mode eos, fairseq-interactive and hub generation raise AttributeError",
    we_do="that one module sees np.compat.long = int",
    test="tests/e2e/test_commands.py",
)
def numpy_of_token_blocks(stock: Any) -> Any:
    return ModuleProxy(stock, compat=ModuleProxy(stock, long=int))
