"""The rules of CONTRIBUTING.md that a machine can check: one-way imports, sizes, documented public names, shapes."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fairseq_moe"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70
MAX_LOOSE_MODULES = 5

# A file may import from its own layer and from those above it in this list, never from below.
LAYERS: list[set[str]] = [
    {"errors", "progress"},
    {"data", "expert_load", "faults", "fused", "modules", "parallel"},
    {"checkpoint", "distributed", "flags"},
    {"criterions", "models", "optim", "tasks"},
    {"convert", "stock"},
    {"checkpoint_tools", "evaluation_harness", "planner"},
    {"report"},
    {"launch"},
    {"inspect"},
]
# The package itself registers everything, so it stands outside.
OUTSIDE = {"__init__"}

# Within ``modules``, the same; and what neither imports the others nor is imported by them. ``reference`` may look at
# everything, because nothing but tests looks at it.
MODULES = PACKAGE / "modules"
MODULE_LAYERS: list[set[str]] = [
    {"parts", "recompute", "shards"},
    {"routing"},
    {"dispatch"},
    {"kernels"},
    {"experts", "shared_experts"},
    {"blocks", "moe_layer", "whole_aux"},
    {"__init__"},
]
MODULES_APART = {"reference"}

# Folders outside ``modules`` whose names carry shapes.
FURTHER_LEGENDS = ("criterions", "expert_load", "fused", "models")

# Docstrings that do not yet say what is done, and folders that do not yet say which question they answer. An entry
# that is not needed any more fails, so that it goes.
UNCLEAR_YET: set[str] = set()
NO_QUESTION_YET: set[str] = set()
NO_LEGEND_YET: set[str] = set()


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


def layer_of(unit: str, layers: list[set[str]]) -> int:
    found = [index for index, layer in enumerate(layers) if unit in layer]
    assert found, f"{unit} is in no layer; give it one"
    return found[0]


def units_in(folder: Path) -> set[str]:
    return {entry.stem if entry.suffix == ".py" else entry.name for entry in folder.iterdir()}


def starts_with(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    unit = unit_of(path)
    if unit in OUTSIDE:
        return
    for module in imports(path):
        other = unit_in(module, "fairseq_moe", PACKAGE)
        if other is not None:
            assert layer_of(other, LAYERS) <= layer_of(unit, LAYERS), f"{module} is above {name_of(path)}"


def unit_in(module: str, package: str, folder: Path) -> str | None:
    """The file or folder directly under ``package`` that ``module`` belongs to, if any."""
    if not module.startswith(package + "."):
        return None
    unit = module.removeprefix(package + ".").split(".")[0]
    return unit if unit in units_in(folder) else None


@pytest.mark.parametrize("path", sorted(MODULES.rglob("*.py")), ids=name_of)
def test_imports_within_modules_go_one_way(path: Path) -> None:
    unit = path.relative_to(MODULES).parts[0].removesuffix(".py")
    for module in imports(path):
        other = unit_in(module, "fairseq_moe.modules", MODULES)
        if other in (None, unit) or unit == "reference":
            continue
        assert unit not in MODULES_APART, f"{name_of(path)} imports {module}, and stands apart from it"
        assert other not in MODULES_APART, f"{name_of(path)} imports {module}, which stands apart"
        above = layer_of(other, MODULE_LAYERS) > layer_of(unit, MODULE_LAYERS)
        assert not above, f"{name_of(path)} imports {module}, which is above it"


def test_few_modules_lie_loose() -> None:
    loose = sorted(path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py")
    assert len(loose) <= MAX_LOOSE_MODULES, f"{loose} lie directly in fairseq_moe; give them a folder"


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
    own = ("torch", "fairseq_moe.fused", "fairseq_moe.modules")
    library = {"collections", "dataclasses", "enum", "functools", "math", "time", "typing"}
    if path.name == "cpu_memory.py":  # where tensors come from, no mathematics
        library |= {"numpy", "os", "threading", "weakref"}
    if path.name == "experts.py":  # draws initial weights on all cores
        library |= {"concurrent", "os"}
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


def first_sentence(text: str) -> str:
    match = re.match(r".*?[.?!](?=\s|$)", text, re.DOTALL)
    return text if match is None else match[0]


def folders() -> list[Path]:
    return sorted(path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)


def area_of(path: Path) -> str:
    """Where a file belongs in the sets of this test that end in YET."""
    parts = path.relative_to(PACKAGE).parts
    return "/".join(parts[: 2 if parts[0] == "modules" else 1]).removesuffix(".py")


def docstring_of(folder: Path) -> str:
    return ast.get_docstring(tree_of(folder / "__init__.py")) or ""


def check(area: str, faults: list[str], yet: set[str]) -> None:
    if area in yet:
        assert faults, f"{area} is in order now; take it out of the set of those that are not"
    else:
        assert not faults, faults


@pytest.mark.parametrize("folder", folders(), ids=name_of)
def test_folders_say_which_question_they_answer(folder: Path) -> None:
    opening = first_sentence(docstring_of(folder))
    check(str(folder.relative_to(PACKAGE)), [] if opening.endswith("?") else [opening], NO_QUESTION_YET)


def unclear_docstrings(path: Path) -> Iterator[str]:
    """Those that open with a word that names nothing, or with a sentence of three words or fewer."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and (
                re.match(r"(Of|What|As|The same|Which)\b", text) or len(first_sentence(text).split()) <= 3
            ):
                yield f"{name_of(path)}:{node.lineno} {node.name}: {first_sentence(text)}"


AREAS = sorted({area_of(path) for path in files()})


def test_what_is_not_in_order_yet_is_there() -> None:
    assert set(AREAS) >= UNCLEAR_YET
    assert {*NO_QUESTION_YET, *NO_LEGEND_YET} <= {str(folder.relative_to(PACKAGE)) for folder in folders()}


@pytest.mark.parametrize("area", AREAS)
def test_docstrings_say_what_is_done(area: str) -> None:
    found = [text for path in files() if area_of(path) == area for text in unclear_docstrings(path)]
    check(area, found, UNCLEAR_YET)


def legend_of(folder: Path) -> set[str]:
    """The letters of the table in a folder's docstring, and of its parent's where it refers to that."""
    text = docstring_of(folder)
    letters = set(re.findall(r"^([A-Za-z])  +\S", text, re.MULTILINE))
    refers = folder != MODULES and "fairseq_moe.modules" in text
    return letters | (legend_of(folder.parent) if refers else set())


def shapes_in(path: Path) -> Iterator[tuple[str, str]]:
    """Names that end in a shape, such as ``x_TD``, and the letters of that; digits are axes of that size."""
    for node in ast.walk(tree_of(path)):
        found = (getattr(node, key, None) for key in ("id", "arg", "attr"))
        for name in (name for name in found if isinstance(name, str) and not name.isupper()):
            match = re.search(r"[a-z0-9]_([A-Za-z0-9]+)$", name)
            if match and re.search("[A-Z]", match[1]):
                yield name, re.sub("[0-9]", "", match[1])


@pytest.mark.parametrize(
    "folder",
    [
        *(path for path in folders() if path.is_relative_to(MODULES)),
        *(PACKAGE / name for name in FURTHER_LEGENDS),
    ],
    ids=name_of,
)
def test_legends_list_every_letter_of_a_shape(folder: Path) -> None:
    legend = legend_of(folder)
    used = {
        (letter, name) for path in folder.glob("*.py") for name, shape in shapes_in(path) for letter in shape
    }
    missing = sorted(f"{letter} in {name}" for letter, name in used if letter not in legend)
    check(str(folder.relative_to(PACKAGE)), missing, NO_LEGEND_YET)


@pytest.mark.parametrize(
    "folder",
    [
        *(MODULES / name for name in ("blocks", "dispatch", "kernels", "routing")),
        *(PACKAGE / name for name in FURTHER_LEGENDS),
    ],
    ids=name_of,
)
def test_legends_list_no_other_letter(folder: Path) -> None:
    used = {letter for path in folder.glob("*.py") for _, shape in shapes_in(path) for letter in shape}
    assert legend_of(folder) <= used
