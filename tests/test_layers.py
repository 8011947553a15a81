"""The package is a stair: each floor imports from floors below it alone, and no module stands outside."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "robustbench_cure"

#: From the ground up. What stands on one floor does not know what else stands there.
FLOORS = (
    ("version", "errors", "state"),
    ("threat", "stats", "files", "progress"),
    ("protocol",),
    ("adapt",),
    ("fold",),
    ("classifier", "datasets"),
    ("attacks",),
    ("interop",),
    ("zoo",),
    ("evaluation",),
    ("geometry", "masking", "training", "loading"),
    ("report",),
    ("gate",),
    ("site",),
    ("studies",),
    ("cli",),
    ("__init__", "__main__"),
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file; a folder's `__init__` has the folder's name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def typing_only(tree: ast.AST) -> set[ast.AST]:
    """Imports below ``if TYPE_CHECKING``: never made at run time."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return {node for block in blocks for part in block.body for node in ast.walk(part)}


def imports(path: Path, *, for_types: bool) -> Iterator[str]:
    """Modules of the package that a file imports, wherever in it the import stands.

    A text that is a module's full name counts as an import: it may be given to `importlib` and its like.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set() if for_types else typing_only(tree)
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if node.value.removeprefix(PACKAGE.name + ".") in MODULES else []
        else:
            continue
        for name in names:
            if name == PACKAGE.name or name.startswith(PACKAGE.name + "."):
                inner = name.removeprefix(PACKAGE.name).removeprefix(".")
                while inner and inner not in MODULES:
                    inner = inner.rpartition(".")[0]
                yield inner or "__init__"


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_room_has_its_floor():
    assert {room(module) for module in MODULES} == FLOOR.keys()
    assert len(FLOOR) <= 28


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    own = room(module)
    for target in imports(MODULES[module], for_types=True):
        if room(target) != own:
            assert FLOOR[room(target)] < FLOOR[own], f"{module} imports {target}, which is not below it"


def test_no_modules_import_each_other_in_a_circle():
    """Not even inside a floor, and not even where the import is made late."""
    below = {module: set(imports(path, for_types=False)) - {module} for module, path in MODULES.items()}
    while below:
        ground = {module for module, targets in below.items() if not targets & below.keys()}
        assert ground, f"a circle among {', '.join(sorted(below))}"
        below = {module: targets for module, targets in below.items() if module not in ground}


@pytest.mark.parametrize(
    "line",
    [
        "from robustbench_cure.cli import main",
        "from robustbench_cure import cli",
        "import robustbench_cure.cli.main as above",
        "def late():\n    from robustbench_cure.cli.main import main",
        "import importlib\nimportlib.import_module('robustbench_cure.cli.main')",
        "from importlib import import_module as load\nload('robustbench_cure.cli.main')",
        "__import__('robustbench_cure.cli.main')",
        "if not TYPE_CHECKING:\n    from robustbench_cure.cli import main",
    ],
)
def test_no_way_to_import_is_overlooked(tmp_path, line):
    file = tmp_path / "below.py"
    file.write_text(line + "\n")
    for for_types in (True, False):
        assert "cli" in {room(target) for target in imports(file, for_types=for_types)}


def test_relative_imports_are_refused(tmp_path):
    (tmp_path / "below.py").write_text("from ..cli import main\n")
    with pytest.raises(AssertionError, match="relative"):
        list(imports(tmp_path / "below.py", for_types=True))


@pytest.mark.parametrize("path", sorted(TESTS.glob("*.py")), ids=lambda path: path.stem)
def test_test_modules_share_through_modules_without_tests(path):
    """What two test modules need lives in `made` or `tiny`: none imports another, by name or by file."""
    local = {other.stem for other in TESTS.glob("*.py")}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    named |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert named & local <= {"made", "tiny"}
    assert "spec_from_file_location" not in {getattr(node, "attr", "") for node in ast.walk(tree)}
