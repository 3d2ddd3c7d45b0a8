"""`specjax.pallas` stands on its own: what it imports, and that nothing there imports in a circle."""

import ast
import graphlib
from pathlib import Path

import specjax

ROOT = Path(specjax.__file__).parent
# Beside itself.
ALLOWED = {"specjax.errors", "specjax.shapes"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in ROOT.rglob("*.py")}


def imported(path: Path) -> set[str]:
    """The modules of specjax that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name.split(".")[0] == "specjax"}


def test_imports_of_pallas():
    graph = {
        name: imported(path) for name, path in MODULES.items() if name.startswith("specjax.pallas.")
    }
    for name, found in graph.items():
        strangers = {other for other in found if not other.startswith("specjax.pallas.")} - ALLOWED
        assert not strangers, f"{name} imports {', '.join(sorted(strangers))}"
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle
