"""scripts/layout_parity.py says that layouts agree with one process, and says so of none whose gradients are wrong.

Run with ``pytest tests/distributed/test_layout_parity.py``.
"""

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import REPOSITORY, run_ranks

HALVES = "legacy_ddp, experts in halves, 2 ranks, 4 experts"
NAMES = ["legacy_ddp, 2 ranks, 4 experts", "ZeRO-3, 2 ranks, 4 experts"]


def _nothing(rank: int) -> None:
    pass


def _keep_expert_gradients_too_large() -> None:
    import fairseq_moe.stock.step.gradients as gradients

    gradients.gradient_divisor = lambda placement, ranks: 1.0  # type: ignore[attr-defined]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; its ranks are forks of the tests' server, which runs before it could start its own."""
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    run_ranks(_nothing, 1)
    return importlib.import_module("layout_parity")


def _layouts(script: Any) -> list[Any]:
    return [layout for layout in script.LAYOUTS if layout.name in NAMES]


def test_layouts_agree_with_one_process(script: Any) -> None:
    found = list(script.measure(_layouts(script)))
    assert [parity.layout.name for parity in found] == NAMES
    for parity in found:
        assert parity.complaint == ""
        assert 0 < parity.gradient < 1e-13 and parity.gnorm < 1e-14


@pytest.mark.parallel
@pytest.mark.timeout(900)
def test_every_layout_agrees_with_one_process(script: Any) -> None:
    found = list(script.measure(list(script.LAYOUTS)))
    assert len(found) == len(script.LAYOUTS)
    assert [parity.complaint for parity in found if parity.complaint] == []


def test_a_wrong_divisor_of_expert_gradients_is_seen(script: Any) -> None:
    (parity,) = script.measure(_layouts(script)[:1], prepare=_keep_expert_gradients_too_large)
    assert parity.gradient == pytest.approx(1.0)  # twice as large, on two ranks
    assert "the gradient of decoder.layers.1.moe_layer.experts." in parity.complaint
    assert "gnorm by" in parity.complaint and "loss by" not in parity.complaint


def _let_every_part_add_the_bias() -> None:
    from fairseq_moe.modules import Experts

    run = Experts._run

    def with_bias(self: Any, *args: Any, **kwargs: Any) -> Any:
        part, self.part = self.part, (0, self.part[1])
        try:
            return run(self, *args, **kwargs)
        finally:
            self.part = part

    Experts._run = with_bias  # type: ignore[method-assign]


def test_a_bias_that_every_part_of_an_expert_adds_is_seen(script: Any) -> None:
    (halves,) = [layout for layout in script.LAYOUTS if layout.name == HALVES]
    right, wrong = (
        next(iter(script.measure([halves], prepare=prepare)))
        for prepare in (None, _let_every_part_add_the_bias)
    )
    assert right.complaint == ""
    assert "loss by" in wrong.complaint


def test_ranks_that_fail_show_why_and_the_next_job_gets_new_ones(script: Any) -> None:
    good = script._job(_layouts(script)[0])
    bad = replace(good, flags=(*good.flags, "--moe-expert-count", "3"))
    failure, reports = script.run_jobs([bad, good])
    assert "rank 0: Traceback" in failure and "3 experts do not fit 2 ranks" in failure
    assert len(reports) == 2 and reports[0].logged["gnorm"] == reports[1].logged["gnorm"]


def test_ranks_that_wait_are_ended_at_the_deadline(script: Any) -> None:
    good = script._job(_layouts(script)[0])
    (failure,) = script.run_jobs([good], prepare=_wait, deadline_sec=1.0)
    assert "rank 0: died" in failure and "rank 1: died" in failure
    assert "Timeout (0:00:01)!" in failure and "in _wait" in failure


def _wait() -> None:
    import time

    time.sleep(60)


@pytest.mark.parametrize(
    ("gradient", "failure", "code", "complaint"),
    [
        (1e-15, "", 0, ""),
        (2e-12, "", 1, "differs from one process in the gradient of x.bias by 2.0e-12, above 1e-12."),
        (math.inf, "", 1, "in the gradient of x.bias by inf, above 1e-12."),
        (math.inf, "rank 1: Traceback", 1, "the ranks failed, as printed above."),
    ],
)
def test_the_table_and_the_exit_code(
    script: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    gradient: float,
    failure: str,
    code: int,
    complaint: str,
) -> None:
    def measure(layouts: list[Any]) -> list[Any]:
        rest = {"parameter": "x.bias", "loss": 0.0, "gnorm": 0.0, "failure": failure}
        return [script.Parity(layout=layout, gradient=gradient, **rest) for layout in layouts]

    for name, replacement in {"measure": measure, "preload": list, "_use_this_checkout": list}.items():
        monkeypatch.setattr(script, name, replacement)
    file = tmp_path / "parity.json"
    monkeypatch.setattr(sys, "argv", ["layout_parity.py", "--layouts", *NAMES, "--json", str(file)])
    assert script.main() == code
    printed = capsys.readouterr()
    assert [line.split(" | ")[0] for line in printed.out.splitlines()[4:6]] == [f"| {name}" for name in NAMES]
    assert printed.err.endswith(complaint + "\n" if complaint else "") and failure in printed.err
    assert printed.err.count(complaint or "no complaint") == 2 * code
    assert [row["name"] for row in json.loads(file.read_text())["layouts"]] == NAMES


def test_names_are_distinct_and_every_backend_is_there(script: Any) -> None:
    names = [layout.name for layout in script.LAYOUTS]
    assert len(set(names)) == len(names)
    ranks = [layout.ranks for layout in script.LAYOUTS]
    assert ranks == sorted(ranks)
    for backend in ("legacy_ddp", "pytorch_ddp", "fully_sharded", "ZeRO-1", "ZeRO-3"):
        assert any(name.startswith(backend) for name in names)
