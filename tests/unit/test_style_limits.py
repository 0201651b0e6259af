"""The rules of CONTRIBUTING.md that a machine can check: one-way imports, sizes, documented public names."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fairseq_moe"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70

# A file may import from its own layer and from those above it in this list, never from below.
LAYERS: list[set[str]] = [
    {"errors", "progress"},
    {"data", "expert_load", "faults", "modules", "parallel"},
    {"checkpoint", "distributed", "flags"},
    {"criterions", "models", "optim", "tasks"},
    {"convert", "stock"},
    {"checkpoint_tools"},
    {"inspect"},
]
# The package itself registers everything, so it stands outside.
OUTSIDE = {"__init__"}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def all_files() -> list[Path]:
    folders = [PACKAGE, ROOT / "tests", ROOT / "scripts", ROOT / "hydra_plugins"]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Every imported module, and every ``module.name`` of a from-import, wherever it stands in the file."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} line {node.lineno}: a relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def unit_of(path: Path) -> str:
    """The file or folder directly under ``fairseq_moe`` that holds ``path``."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def layer_of(unit: str) -> int:
    found = [index for index, layer in enumerate(LAYERS) if unit in layer]
    assert found, f"fairseq_moe/{unit} is in no layer; give it one in LAYERS"
    return found[0]


def starts_with(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    unit = unit_of(path)
    if unit in OUTSIDE:
        return
    units = {entry.stem if entry.suffix == ".py" else entry.name for entry in PACKAGE.iterdir()}
    for module in imports(path):
        if not module.startswith("fairseq_moe."):
            continue
        other = module.split(".")[1]
        if other in units:
            assert layer_of(other) <= layer_of(unit), f"{name_of(path)} imports {module}, which is above it"


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_torch_distributed_has_one_door(path: Path) -> None:
    if unit_of(path) == "distributed":
        return
    text = tree_of(path)
    attributes = [ast.unparse(node) for node in ast.walk(text) if isinstance(node, ast.Attribute)]
    used = [name for name in [*imports(path), *attributes] if starts_with(name, "torch.distributed")]
    assert not used, f"{name_of(path)} uses {used[0]}; fairseq_moe.distributed is the place for it"


@pytest.mark.parametrize("path", sorted((PACKAGE / "modules").rglob("*.py")), ids=name_of)
def test_modules_know_torch_and_one_another_only(path: Path) -> None:
    own = ("torch", "fairseq_moe.modules")
    library = {"collections", "dataclasses", "enum", "functools", "math", "time", "typing"}
    if path.name == "cpu_memory.py":  # where tensors come from, no mathematics
        library |= {"numpy", "os", "threading", "weakref"}
    foreign = [
        module
        for module in imports(path)
        if not any(starts_with(module, prefix) for prefix in own) and module.split(".")[0] not in library
    ]
    assert not foreign


@pytest.mark.parametrize("path", all_files(), ids=name_of)
def test_sizes(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_FILE_LINES, f"{name_of(path)} has {lines} lines"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{name_of(path)}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", all_files(), ids=name_of)
def test_ascii(path: Path) -> None:
    assert path.read_text(encoding="utf-8").isascii()


def undocumented(path: Path) -> Iterator[str]:
    tree = tree_of(path)
    if not ast.get_docstring(tree):
        yield "the module"
    seams = {id(node) for node in tree.body if _is_seam(node)}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node) and id(node) not in seams:
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (
                f"{node.name}.{method.name}"
                for method in node.body
                if isinstance(method, ast.FunctionDef)
                and not method.name.startswith("_")
                and not ast.get_docstring(method)
            )


def _is_seam(node: ast.stmt) -> bool:
    """A function whose decorator says what it does: the arguments of ``@seam`` are its documentation."""
    return isinstance(node, ast.FunctionDef) and any(
        isinstance(call, ast.Call) and ast.unparse(call.func) == "seam" for call in node.decorator_list
    )


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_public_names_are_documented(path: Path) -> None:
    assert list(undocumented(path)) == []


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_all_lists_names_that_exist(path: Path) -> None:
    tree = tree_of(path)
    listed = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    for node in ast.walk(tree):  # an import may stand under a condition
        if isinstance(node, ast.Assign):
            defined |= {ast.unparse(target) for target in node.targets}
        elif isinstance(node, ast.AnnAssign):
            defined.add(ast.unparse(node.target))
        elif isinstance(node, ast.ImportFrom | ast.Import):
            defined |= {alias.asname or alias.name for alias in node.names}
    for names in listed:
        assert sorted(names) == sorted(set(names)), "a name is listed twice"
        assert set(names) <= defined
