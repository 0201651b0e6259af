"""The length of blocks where none was given, and how the commands know that none was."""

import pytest

from tests.helpers.ranks import run_ranks


@pytest.mark.parametrize(
    ("default", "positions", "adds_token", "expected"),
    [
        (1024, 2048, True, 1024),  # what fits keeps its number
        (1024, 1024, True, 1024),  # fits by stock's rule, which does not count the beginning token
        (1024, 64, False, 64),
        (1024, 64, True, 63),  # or the last token would have no position
    ],
)
def test_length_is_the_default_where_it_fits(
    default: int, positions: int, adds_token: bool, expected: int
) -> None:
    assert run_ranks(_fitting_length, 1, default, positions, adds_token) == [expected]


def _fitting_length(rank: int, default: int, positions: int, adds_token: bool) -> int:
    from fairseq_moe.stock.evaluation.lengths import fitting_length

    return fitting_length(default, positions=positions, adds_token=adds_token)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [([], False), (["--tokens-per-sample", "1024"], True), (["--tokens-per-sample=7"], True)],
)
def test_flag_that_is_given_its_default_is_given(argv: list[str], expected: bool) -> None:
    assert run_ranks(_is_given, 1, argv) == [expected]


def _is_given(rank: int, argv: list[str]) -> bool:
    from fairseq import options

    import fairseq_moe  # noqa: F401
    from fairseq_moe.stock.start.given import flag_is_given

    options.parse_args_and_arch(options.get_eval_lm_parser(), ["data", "--path", "x.pt", *argv])
    return flag_is_given("tokens_per_sample", differs=False)


def test_without_a_command_line_the_value_decides_and_hydras_overrides_count() -> None:
    assert run_ranks(_ask_without_command_line, 1) == [[True, False, True]]


def _ask_without_command_line(rank: int) -> list[bool]:
    from types import SimpleNamespace

    import fairseq_moe  # noqa: F401
    from fairseq_moe.stock.start import given

    answers = [given.flag_is_given("tokens_per_sample", differs=differs) for differs in (True, False)]
    overrides = SimpleNamespace(overrides=SimpleNamespace(task=["+task.tokens_per_sample=1024"]))
    given.HydraConfig = SimpleNamespace(initialized=lambda: True, get=lambda: overrides)  # type: ignore[misc]
    return [*answers, given.flag_is_given("tokens_per_sample", differs=False)]
