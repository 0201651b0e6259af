"""The tables in docs/flags.md, seams.md, reliability.md and from-megatron.md are those that the code prints.

After a change: ``python -m tests.unit.test_docs`` writes them anew.
"""

import re
from pathlib import Path

import pytest

from tests.helpers.ranks import REPOSITORY, run_ranks

PLACES = {
    "seams": "docs/seams.md",
    "flags": "docs/flags.md",
    "stock-flags": "docs/flags.md",
    "resume": "docs/reliability.md",
    "modelzoo-variables": "docs/from-megatron.md",
}


def tables(rank: int = 0) -> dict[str, str]:
    """The tables by name; imports fairseq, so tests run it in a fork."""
    from fairseq_moe.launch.variables import variables_table
    from fairseq_moe.stock.tables import own_flags_tables, resume_table, seams_table, stock_flags_table

    return {
        "seams": seams_table(),
        "flags": own_flags_tables(),
        "stock-flags": stock_flags_table(),
        "resume": resume_table(),
        "modelzoo-variables": variables_table(),
    }


def block(text: str, name: str) -> re.Match[str]:
    """The part of a document between the two marks of a table."""
    found = re.search(rf"(<!-- {name}: begin -->\n)(.*?)(<!-- {name}: end -->)", text, re.DOTALL)
    assert found is not None, name
    return found


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    return run_ranks(tables, 1)[0]


@pytest.mark.parametrize("name", sorted(PLACES))
def test_documents_show_the_table_that_the_code_prints(name: str, printed: dict[str, str]) -> None:
    text = (REPOSITORY / PLACES[name]).read_text()
    assert block(text, name)[2].strip() == printed[name].strip(), "run python -m tests.unit.test_docs"


@pytest.mark.parametrize("folder", ["tests", "fairseq_moe"])
def test_every_file_that_a_table_names_exists(folder: str, printed: dict[str, str]) -> None:
    named = {file for table in printed.values() for file in re.findall(rf"\b{folder}/[\w/]+\.py", table)}
    assert named
    assert [file for file in sorted(named) if not (REPOSITORY / file).is_file()] == []


def test_every_seam_names_the_file_that_defines_it(printed: dict[str, str]) -> None:
    for row in printed["seams"].splitlines()[2:]:
        target, file = re.findall(r"`([^`]+)`", row)[:2]
        text = (REPOSITORY / file).read_text()
        assert "seam(" in text and target.split(":")[1] in text, f"{target} is not in {file}"


def test_every_flag_is_in_one_group(printed: dict[str, str]) -> None:
    """The list of flags is the one that ``tests/unit/flags/test_flag_list.py`` keeps."""
    shown = re.findall(r"^\| `--([\w-]+)`", printed["flags"], re.MULTILINE)
    golden = (REPOSITORY / "tests" / "golden" / "flags.txt").read_text()
    declared = re.findall(r"^(\w+): ", golden, re.MULTILINE)
    assert sorted(name.replace("-", "_") for name in shown) == sorted({*declared} - {"batch_size"})


def _rewrite() -> None:
    for name, table in tables().items():
        path = Path(REPOSITORY / PLACES[name])
        text = path.read_text()
        found = block(text, name)
        path.write_text(text[: found.end(1)] + table + "\n" + text[found.start(3) :])


if __name__ == "__main__":
    _rewrite()
