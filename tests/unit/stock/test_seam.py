"""The machinery of the adapter, and that every change of stock fairseq is in place."""

import functools
import importlib
import inspect
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import fairseq_moe.stock
from fairseq_moe.errors import StockSeamError
from fairseq_moe.stock import SEAMS
from fairseq_moe.stock import seam as machinery
from fairseq_moe.stock.proxy import ModuleProxy
from fairseq_moe.stock.seam import install_seams, seam

_STOCK = """
import math
SCALE = 2

def double(x, *, by=SCALE):
    return x * by

def quadruple(x):
    return double(double(x))

class Thing:
    @property
    def name(self):
        return "stock"
"""


@pytest.fixture
def no_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of declared seams is empty."""
    monkeypatch.setattr(machinery, "SEAMS", [])


@pytest.fixture
def stock(no_seams: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module to change."""
    (tmp_path / "stock_for_seams.py").write_text(_STOCK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "stock_for_seams", raising=False)
    return importlib.import_module("stock_for_seams")


def _declare(target: str, signature: str | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return seam(target, signature=signature, stock_does="a", breaks="b", we_do="c", test="d")


def test_function_is_replaced_where_its_own_module_looks_it_up(stock: ModuleType) -> None:
    @_declare("stock_for_seams:double", "(x, by)")
    def double(original: Any, x: int, **kwargs: Any) -> int:
        return original(x, **kwargs) + 1

    install_seams()
    assert stock.double(3) == 7
    assert stock.quadruple(3) == 15
    assert inspect.unwrap(stock.double)(3) == 6


def test_installing_twice_changes_once(stock: ModuleType) -> None:
    @_declare("stock_for_seams:double", "(x, by)")
    def double(original: Any, x: int) -> int:
        return original(x) + 1

    install_seams()
    install_seams()
    assert stock.double(3) == 7


def test_property_is_replaced(stock: ModuleType) -> None:
    @_declare("stock_for_seams:Thing.name", None)
    def name(original: Any, self: Any) -> str:
        return f"not {original(self)}"

    install_seams()
    assert stock.Thing().name == "not stock"


def test_class_and_module_are_made_once(stock: ModuleType) -> None:
    @_declare("stock_for_seams:Thing", None)
    def thing(original: Any) -> Any:
        return functools.partial(SimpleNamespace, kind=original.__name__)

    @_declare("stock_for_seams:math", None)
    def proxy(original: Any) -> Any:
        return ModuleProxy(original, pi=3)

    install_seams()
    assert stock.Thing().kind == "Thing"
    assert stock.math.pi == 3
    assert stock.math.sqrt(4) == 2
    assert stock.math.__fairseq_moe_seam__ == "stock_for_seams:math"


@pytest.mark.parametrize(
    ("target", "signature", "found"),
    [
        ("stock_for_seams:double", "(x, factor)", "(x, by)"),
        ("stock_for_seams:triple", "(x)", "nothing of that name"),
        ("stock_for_seams:Thing.title", None, "nothing of that name"),
    ],
)
def test_other_fairseq_is_refused_with_a_sentence(
    target: str, signature: str | None, found: str, stock: ModuleType
) -> None:
    _declare(target, signature)(lambda original: None)
    with pytest.raises(StockSeamError) as raised:
        install_seams()
    assert f"fairseq_moe adapts {target}, expected" in str(raised.value)
    assert f"but this fairseq has {found}; install the fairseq named in" in str(raised.value)


def test_command_is_changed_once_it_is_imported_and_not_before(
    stock: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @_declare("fairseq_cli.score:get_parser", "()")
    def get_parser(original: Any) -> str:
        return "ours"

    monkeypatch.delitem(sys.modules, "fairseq_cli.score", raising=False)
    install_seams()
    assert "fairseq_cli.score" not in sys.modules
    command = importlib.import_module("fairseq_cli.score")
    install_seams()
    assert command.get_parser() == "ours"
    monkeypatch.delitem(sys.modules, "fairseq_cli.score")


def test_command_that_runs_as_main_is_changed_in_the_namespace_of_its_functions(
    no_seams: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    @_declare("fairseq_cli.score:get_parser", "()")
    def get_parser(original: Any) -> str:
        return "ours"

    # What multiprocessing's spawn does: __main__ becomes a copy of the namespace that was executed.
    copied = ModuleType("__mp_main__")
    copied.__dict__.update(runpy.run_module("fairseq_cli.score", run_name="__mp_main__", alter_sys=True))
    monkeypatch.setitem(sys.modules, "__mp_main__", copied)
    assert copied.cli_main.__globals__ is not copied.__dict__
    install_seams()
    assert copied.get_parser() == "ours"
    assert copied.cli_main.__globals__["get_parser"]() == "ours"


@pytest.fixture(scope="module")
def commands() -> None:
    """All commands that a seam names are imported and changed."""
    for entry in SEAMS:
        importlib.import_module(entry.target.split(":")[0])
    fairseq_moe.stock.install()


@pytest.mark.parametrize("entry", SEAMS, ids=lambda entry: entry.target)
def test_seam_is_in_place(entry: Any, commands: None) -> None:
    module_name, path = entry.target.split(":")
    *parents, name = path.split(".")
    owner = functools.reduce(getattr, parents, importlib.import_module(module_name))
    found = inspect.getattr_static(owner, name)
    found = found.fget if isinstance(found, property) else found
    if found is not sys.modules.get("torch"):  # left alone where there is CUDA
        assert found.__fairseq_moe_seam__ == entry.target


@pytest.mark.parametrize("entry", SEAMS, ids=lambda entry: entry.target)
def test_seam_says_what_and_why(entry: Any) -> None:
    for text in (entry.stock_does, entry.breaks, entry.we_do, entry.test):
        assert text
        assert not text.endswith(".")
        assert "|" not in text  # they become cells of a table


def test_targets_differ() -> None:
    targets = [entry.target for entry in SEAMS]
    assert sorted(set(targets)) == sorted(targets)


def test_number_of_workers_for_validation_is_honoured() -> None:
    (entry,) = [entry for entry in SEAMS if entry.target.endswith("Trainer.get_valid_iterator")]

    def stock_get_valid_iterator(self: Any, subset: str, disable_iterator_cache: bool) -> int:
        return self.cfg.dataset["num_workers"]

    for given, expected in ((3, 3), (None, 1)):
        cfg = SimpleNamespace(dataset={"num_workers": 1}, model=SimpleNamespace(num_workers_valid=given))
        trainer = SimpleNamespace(cfg=cfg)
        assert entry.replacement(stock_get_valid_iterator, trainer, "valid") == expected
        assert cfg.dataset == {"num_workers": 1}


@pytest.mark.parametrize(
    ("flags", "bf16", "tpu"),
    [([], False, False), (["--bf16"], True, False), (["--bf16", "--tpu"], True, True)],
)
def test_bf16_does_not_mean_tpu(flags: list[str], bf16: bool, tpu: bool) -> None:
    from fairseq import options

    parser = options.get_training_parser()
    args = options.parse_args_and_arch(parser, ["--arch", "transformer_lm", "--task", "dummy_lm", *flags])
    assert (args.bf16, args.tpu) == (bf16, tpu)
