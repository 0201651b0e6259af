"""R10: the flags in a checkpoint are values, never programs.

torch loads a text with ``weights_only=True``, and stock fairseq evaluates several flags of a model as Python when it
builds the model that a file describes. ``fairseq_moe.stock.checkpoint.untrusted`` looks at them first.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.untrusted import COMMANDS, EVAL, Copy, Spoilt, assert_refused, attempts, change_main

_FLAG = "decoder_xformers_att_config"


def _model(**flags: str) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["cfg"]["model"].update(flags)


def _dense(program: str) -> Callable[[dict[str, Any]], None]:
    """Without our list of shards, by another architecture of stock's that evaluates the list of its layers."""

    def disguise(state: dict[str, Any]) -> None:
        del state["fairseq_moe"]
        model = {"_name": "fconv_lm", "arch": "fconv_lm", "decoder_layers": program}
        state["cfg"]["model"] = {**model, "tokens_per_sample": 32, "decoder_attention": "False"}

    return disguise


def _programs(marker: Path) -> dict[str, tuple[str, Callable[[dict[str, Any]], None]]]:
    """By case: the flag that is to be named, and how the program gets into a checkpoint."""
    call = f"__import__('os').makedirs({str(marker)!r})"
    parts = {"activation_fn": call[:11], "decoder_output_dim": call[11:]}
    return {
        "a call": (_FLAG, _model(**{_FLAG: call})),
        "after blanks": (_FLAG, _model(**{_FLAG: f" \t{call}"})),
        "inside a list": (_FLAG, _model(**{_FLAG: f"[(512, {call})] * 2"})),
        "from parts": (_FLAG, _model(**parts, **{_FLAG: "${.activation_fn}${.decoder_output_dim}"})),
        "from parts to come": ("no_such_flag", _model(**{_FLAG: call[:11] + "${.no_such_flag}" + call[11:]})),
        "dense": ("decoder_layers", _dense(call)),
    }


def test_a_flag_that_holds_a_program_is_refused(copy: Copy, text_data: Path, marker: Path) -> None:
    files = {}
    for case, (flag, change) in _programs(marker).items():
        main = copy(case)
        change_main(main, change)
        commands = COMMANDS[1:] if case == "a call" else EVAL
        files[case] = Spoilt(main=main, named=flag, commands=commands)
    main = copy("task")  # whose flags only from_pretrained takes from the file
    change_main(
        main, lambda state: state["cfg"]["task"].update(sample_break_mode=f"open({str(marker)!r}, 'w')")
    )
    files["task"] = Spoilt(main=main, named="sample_break_mode")
    assert_refused(text_data, files)
    assert not marker.exists()


@pytest.mark.parametrize("case", ["a call", "dense"])
def test_these_tests_see_a_program_that_runs(case: str, copy: Copy, text_data: Path, marker: Path) -> None:
    main = copy("spoilt")
    change_main(main, _programs(marker)[case][1])
    attempts(text_data, {case: Spoilt(main=main, named="")}, "take programs")
    assert marker.exists()


@pytest.mark.parametrize(
    ("text", "is_program"),
    [
        ("gelu", False), ("a b", False), ("[(512, 10, 5)] + [(512, 3)] * 4", False), ("{'name': 'linformer'}", False),
        ("-1e-3", False), ("(0.9, 0.98)", False), ("None", False), ("/data/text(1)", False), ("", False),
        ("f()", True), ("[0 for torch.load in [exec]]", True), ("lambda: 0", True), ("f'{x!r}'", True),
        ("(x := 1)", True), ("x[0]", True), ("(" * 4000, False), ("-" * 100_000 + "1", True),
    ],
)  # fmt: skip
def test_what_a_program_is(text: str, is_program: bool) -> None:
    from fairseq_moe.stock.checkpoint.untrusted import _is_program

    assert _is_program(text) is is_program
