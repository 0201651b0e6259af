"""Command lines and small library changes: what stock parses wrongly, and NumPy 2."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from fairseq_moe.stock.proxy import ModuleProxy
from fairseq_moe.stock.seam import seam


@seam(
    "fairseq.options:parse_args_and_arch",
    signature="(parser, input_args, parse_known, suppress_defaults, modify_parser)",
    stock_does="takes --bf16 for a TPU run, also on GPUs and CPUs, and knows no --is-moe",
    breaks="--bf16 ends in an XLA error; the branch's evaluation commands do not parse",
    we_do="bf16 without TPU unless --tpu is given; --is-moe is accepted where a model is loaded (it is not "
    "needed: checkpoints say what they are)",
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
    parsed = stock(parser, input_args, parse_known, suppress_defaults, modify_parser)
    args = parsed[0] if parse_known else parsed
    given = sys.argv[1:] if input_args is None else input_args
    if getattr(args, "bf16", False) and "--tpu" not in given:
        args.tpu = False
    return parsed


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
