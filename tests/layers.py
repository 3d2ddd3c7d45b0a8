"""The layers of specjax, lowest first: a room imports those before it, and no module imports in a circle.

`python -m tests.layers` prints the layers and what it found; `test_packaging` fails on anything found. Imports inside
functions count, and there is no list of exceptions.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests import paths

PACKAGE = "specjax"
LAYERS = (
    ("errors", "an error says field, value found, what is supported, what to do"),
    ("version", "the version of this package"),
    ("shapes", "the letters of shape annotations"),
    ("config", "what a model states about itself"),
    ("files", "named tensors in files, read one at a time, written whole; names and downloads"),
    ("text", "tokenizers, chat templates, stop strings"),
    ("pallas", "one folder per op: reference, kernels, choice of backend"),
    ("quant", "linears, dense and quantized: what codes mean and how they run"),
    ("models", "targets, draft heads, the KV cache, the form that runs"),
    ("decoding", "what a step is made of: trees, the target's pass, sampling"),
    ("verify", "acceptance rules"),
    ("depth", "which layers a token runs through"),
    ("checkpoints", "one reader per format, export"),
    ("quantize", "making codes: methods, calibration, rotations, the self-check"),
    ("loading", "from a path to a network that runs"),
    ("drafters", "what proposes trees; their registry"),
    ("engine", "the loop, batches, programs, metrics"),
    ("language_model", "text in, text out: `specjax.load`, `.generate`, `.stream`"),
    ("serving", "requests that come and go: scheduler, runner, server"),
    ("scoring", "logits and perplexity of given texts"),
    ("conversion", "`specjax.convert`"),
    ("tokenizer", "the public name of text.tokenizer"),
    ("training", "draft heads, routers, predictors"),
    ("aot", "programs and kernels compiled for GPUs that are not here"),
)


def modules(root: Path = paths.REPOSITORY) -> dict[str, Path]:
    """The files of the package by dotted name, a package's `__init__` under the package's name."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at any depth of its code; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def edges(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """Which modules of the package each of them names in its imports.

    `from a import b` with a module b is an import of b alone: that a package's `__init__` runs first is no dependency
    of one room on another.
    """
    graph = {}
    for module, path in files.items():
        named = {name for name in imports(path) if name in files and name != module}
        packages = {name for name in named if any(n.startswith(f"{name}.") for n in named)}
        graph[module] = {
            name for name in named if name not in packages or _gives_more(path, name, files)
        }
    return graph


def _gives_more(path: Path, package: str, files: Mapping[str, Path]) -> bool:
    """Whether a file takes a name from a package that is no module of it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            return any(f"{package}.{alias.name}" not in files for alias in node.names)
    return True


def circles(graph: Mapping[str, set[str]]) -> list[tuple[str, ...]]:
    """Sets of modules that import each other, each sorted (strongly connected components, Tarjan 1972)."""
    index, low, stack, found = {}, {}, [], []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in index:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == index[module]:
            members = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(members) > 1:
                found.append(tuple(sorted(members)))

    for module in sorted(graph):
        if module not in index:
            visit(module)
    return sorted(found)


def room(module: str) -> str:
    """The layer that a module belongs to; the package itself is above all."""
    return module.split(".")[1] if "." in module else PACKAGE


def upward(graph: Mapping[str, set[str]]) -> list[str]:
    """Imports of a room by one that lies below it, and rooms that no layer names."""
    order = {name: place for place, (name, _) in enumerate((*LAYERS, (PACKAGE, "")))}
    wrong = [f"{m}: {room(m)!r} is in no layer" for m in graph if room(m) not in order]
    for module, others in graph.items():
        for other in sorted(others):
            if order.get(room(other), 0) > order.get(room(module), 0):
                wrong.append(f"{module} imports {other}, which lies above it")
    return sorted(wrong)


def main() -> int:
    """Prints the layers and what breaks them; 1 if anything does."""
    graph = edges(modules())
    for name, clause in LAYERS:
        size = sum(room(module) == name for module in graph)
        print(f"{name:15} {size:3} modules  {clause}")
    wrong = upward(graph)
    for line in wrong:
        print(f"against the layers: {line}")
    found = circles(graph)
    for members in found:
        print(f"circle: {' <-> '.join(members)}")
    print(f"{len(graph)} modules, {len(wrong)} imports against the layers, {len(found)} circles")
    return int(bool(wrong or found))


if __name__ == "__main__":
    sys.exit(main())
