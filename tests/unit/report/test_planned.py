"""Utilisation and the comparison with a plan, beside published and hand-made numbers."""

import pytest

from fairseq_moe.report.log import Point
from fairseq_moe.report.planned import Planned, comparison, measured_rows
from fairseq_moe.report.series import Series, gate_losses, of, thinned

NONE = Series(label="", updates=[], values=[])


def series(*values: float) -> Series:
    return Series(label="x", updates=list(range(1, len(values) + 1)), values=list(values))


def test_utilisation_is_that_of_published_runs() -> None:
    """Qwen3-30B-A3B at s 4096: NVIDIA publishes 277 TFLOP/s at 12,040 words/s of each GPU; H100's peak is 989.4."""
    plan = Planned.from_json(
        {"flops_per_token": 23.006282e9, "num_ranks": 16, "device": {"peak_flops": 989.4e12}}
    )
    factor = plan.mfu_frac_per_word_per_sec
    assert factor is not None
    assert factor * 12_040 * 16 == pytest.approx(277 / 989.4, rel=1e-3)


@pytest.mark.parametrize("missing", ["flops_per_token", "num_ranks", "device"])
def test_no_utilisation_without_one_of_its_numbers(missing: str) -> None:
    plan = {"flops_per_token": 1.0, "num_ranks": 1, "device": {"peak_flops": 1.0}}
    assert Planned.from_json(plan).mfu_frac_per_word_per_sec == 1
    assert Planned.from_json({**plan, missing: "many"}).mfu_frac_per_word_per_sec is None


def test_comparison_with_a_plan() -> None:
    plan = Planned.from_json(
        {"words_per_sec": [1100, 900], "step_sec": [0.25, 0.4], "update_tokens": 500, "peak_bytes": 2 << 30}
    )
    rows = comparison(
        plan, wps=series(10, 1000, 1010), ups=series(2, 2), words=series(450), reserved_gib=series(1, 3, 2)
    )
    assert [(row.what, row.planned, row.measured, row.ratio) for row in rows] == [
        ("words per second", "900 to 1,100", "1,000", "as planned"),
        ("seconds per update", "0.25 to 0.4", "0.5", "1.25"),
        ("words per update", "500", "450", "0.90"),
        ("peak memory, GiB", "2.00", "3.00", "1.50"),
    ]


def test_what_neither_was_planned_nor_measured_is_no_row() -> None:
    rows = comparison(Planned(), wps=series(7), ups=NONE, words=NONE, reserved_gib=NONE)
    assert [(row.what, row.planned, row.measured, row.ratio) for row in rows] == [
        ("words per second", "-", "7", "-")
    ]


def test_measured_json_may_hold_anything() -> None:
    rows = measured_rows(
        {
            "updates": 6000,
            "peak_bytes": {"planned": 100, "measured": 150},
            "note": "x",
            "rate": 0.12345,
            "none": None,
            "planned": {"peak_bytes": 100},  # of the launcher, which the plan says too
        }
    )
    assert [(row.what, row.planned, row.measured, row.ratio) for row in rows] == [
        ("updates", "-", "6,000", "-"),
        ("peak bytes", "100", "150", "1.50"),
        ("note", "-", "x", "-"),
        ("rate", "-", "0.1235", "-"),
        ("none", "-", "-", "-"),
    ]


def test_series_leave_out_what_is_not_finite_and_what_is_always_0() -> None:
    points = [
        Point(
            update=2, values={"a": 1.0, "moe_z_loss": 0.0, "moe_gate_loss": 1.0, "mtp_loss": 3.0, "loss": 1.0}
        ),
        Point(update=4, values={"a": float("nan"), "moe_z_loss": 0.0}),
        Point(update=6, values={"a": 5.0}),
    ]
    found = of(points, "a")
    assert (found.updates, found.values, found.num_left_out) == ([2, 6], [1.0, 5.0], 1)
    assert [each.label for each in gate_losses(points)] == ["moe_gate_loss", "mtp_loss"]


def test_thinned_series_keep_their_mean_and_end() -> None:
    found, step = thinned(series(1, 2, 3, 4, 5, 6, 7), most=3)
    assert (step, found.updates, found.values) == (3, [3, 6, 7], [2, 5, 7])
    assert thinned(series(1, 2), most=2) == (series(1, 2), 1)


def test_a_number_beyond_all_others_is_left_out() -> None:
    assert Planned.from_json({"flops_per_token": 10**400, "num_ranks": 2}) == Planned(num_ranks=2.0)
