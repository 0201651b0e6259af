"""Helpers that find nothing say so, tests share code through tests/helpers alone, and folders name their tests."""

import ast
import re
from pathlib import Path

import pytest
import torch

from tests.e2e.commands import json_lines, perplexity
from tests.helpers.checkpoints import assert_same, contents
from tests.helpers.docs import documented_command
from tests.helpers.formats import write_dense
from tests.helpers.ranks import CommandResult
from tests.helpers.updates import assert_all_equal

TESTS = Path(__file__).resolve().parents[1]
REPOSITORY = TESTS.parent
FOLDERS = sorted(path.parent for path in (REPOSITORY / "fairseq_moe").rglob("__init__.py"))
SILENT = CommandResult(exit_codes=[0], outputs=['| train | {"loss": "1.0"}\n'])


def test_lines_of_a_log() -> None:
    assert json_lines(SILENT, "train") == [{"loss": "1.0"}]
    with pytest.raises(AssertionError, match="printed no record of train_inner"):
        json_lines(SILENT, "train_inner")
    with pytest.raises(AssertionError):
        perplexity(SILENT)


def test_contents_and_comparisons(tmp_path: Path) -> None:
    path = write_dense(tmp_path / "a.pt")
    torch.save({**torch.load(path, weights_only=True), "fairseq_moe": {"shards": []}}, path)
    with pytest.raises(AssertionError, match="names no shard"):
        contents(path)
    with pytest.raises(AssertionError, match="nothing to compare"):
        assert_same({}, {})
    with pytest.raises(AssertionError):
        assert_all_equal([], {})
    with pytest.raises(ValueError, match="not enough values"):
        documented_command("checkpoints.md", "no-such-command")


@pytest.mark.parametrize(
    "path", sorted(TESTS.rglob("test_*.py")), ids=lambda path: str(path.relative_to(TESTS))
)
def test_no_test_imports_another(path: Path) -> None:
    imported = [
        node.module
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module is not None
    ]
    assert not [module for module in imported if module.rpartition(".")[2].startswith("test_")]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(REPOSITORY)))
def test_folders_say_where_they_are_tested(folder: Path) -> None:
    """The last paragraph of the folder's docstring; ``NAME: FILE`` in it is about that module of the folder."""
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    last = text.split("\n\n")[-1].replace("\n", " ")
    assert last.startswith("Tests: "), (
        "end the docstring with a paragraph 'Tests: tests/..., ...; NAME: tests/....'"
    )
    paths = re.findall(r"tests/[\w/]+(?:\.py)?", last)
    assert paths
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []
    modules = [name for names in re.findall(r"; ([\w, ]+): tests/", last) for name in names.split(", ")]
    known = {path.stem for path in folder.iterdir()}
    assert [name for name in modules if " " not in name and name not in known] == []
