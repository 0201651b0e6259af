"""The tables in README.md and CONTRIBUTING.md are those that the code prints.

After a change: ``python -m tests.unit.test_docs`` writes them anew.
"""

import re
from pathlib import Path

import pytest

from tests.helpers.ranks import REPOSITORY, run_ranks

PLACES = {"seams": "CONTRIBUTING.md", "flags": "README.md", "stock-flags": "README.md"}


def tables(rank: int = 0) -> dict[str, str]:
    """The tables by name; imports fairseq, so tests run it in a fork."""
    from fairseq_moe.stock.tables import flags_table, own_flags_table, seams_table

    return {"seams": seams_table(), "flags": own_flags_table(), "stock-flags": flags_table()}


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


def test_every_test_file_that_a_table_names_exists(printed: dict[str, str]) -> None:
    named = {file for table in printed.values() for file in re.findall(r"tests/[\w/]+\.py", table)}
    assert named
    assert [file for file in sorted(named) if not (REPOSITORY / file).is_file()] == []


def _rewrite() -> None:
    for name, table in tables().items():
        path = Path(REPOSITORY / PLACES[name])
        text = path.read_text()
        found = block(text, name)
        path.write_text(text[: found.end(1)] + table + "\n" + text[found.start(3) :])


if __name__ == "__main__":
    _rewrite()
