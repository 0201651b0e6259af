"""The folders of the adapter import one way: how a command starts knows nothing of how a checkpoint is saved."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

STOCK = Path(__file__).resolve().parents[3] / "fairseq_moe" / "stock"
# A file may import from its own entry and from those above it in this list.
ROOMS = [
    {"find_experts", "optim", "proxy", "run", "seam"},
    {"start"},
    {"checkpoint"},
    {"sharding"},
    {"step"},
    {"dictionary", "evaluation", "tables"},
]


def room_of(name: str) -> int:
    (found,) = [number for number, room in enumerate(ROOMS) if name in room]
    return found


def imports(path: Path) -> Iterator[str]:
    """Parts of the adapter that a file imports when it runs; what a type checker alone reads is left out."""
    tree = ast.parse(path.read_text())
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    ]
    for node in ast.walk(tree):
        module = node.module if isinstance(node, ast.ImportFrom) else None
        if module is not None and module.startswith("fairseq_moe.stock."):
            yield module.split(".")[2]


@pytest.mark.parametrize("path", sorted(STOCK.rglob("*.py")), ids=lambda path: str(path.relative_to(STOCK)))
def test_imports_go_one_way(path: Path) -> None:
    own = path.relative_to(STOCK).parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):  # they put everything together
        return
    upward = [other for other in imports(path) if room_of(other) > room_of(own)]
    assert not upward, f"{path.name} imports {upward}"
