"""Guards on what importing costs, what may import what, and what the package promises to its users."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

import specjax
from tests import layers, paths, resume

ROOT = paths.REPOSITORY
LIBRARY = sorted((ROOT / "specjax").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LAZY = ("transformers", "torch", "tokenizers", "orbax", "matplotlib", "gguf", "huggingface_hub")

IMPORT = f"""
import json, sys, time
begin = time.perf_counter()
import jax, flax.nnx
theirs = time.perf_counter() - begin
before = set(sys.modules)
begin = time.perf_counter()
import specjax
own = time.perf_counter() - begin
loaded = [name for name in {LAZY} if name in set(sys.modules) - before]
print(json.dumps([theirs, own, loaded]))
"""


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **options)


def tracked(*patterns):
    """Files of the repository that are committed or would be, as paths."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *patterns]
    names = set(run(*command, check=True).stdout.split("\0")) - {""}
    return sorted(ROOT / name for name in names if (ROOT / name).is_file())


def attributes(path):
    """Every dotted name that a file reads, e.g. "os.environ"."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute | ast.Name):
            yield ast.unparse(node)


def relative(path):
    return path.relative_to(ROOT).as_posix()


def test_importing_costs_little_beyond_jax_and_flax():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    theirs, own, loaded = json.loads(
        run(sys.executable, "-c", IMPORT, env=environment, check=True).stdout
    )
    assert loaded == []
    assert own < 0.5 * theirs, f"specjax {own:.2f} s, jax and flax {theirs:.2f} s"


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("drafters", "specjax.quant"),
        ("models", "specjax.drafters"),
        ("verify", "specjax.drafters"),
        ("quant", "specjax.drafters"),
        (".", "experiments"),
        (".", "tests"),
        (".", "absl"),
        (".", "torch"),
    ],
)
def test_import_rules(folder, forbidden):
    files = [path for path in LIBRARY if path.is_relative_to(ROOT / "specjax" / folder)]
    assert files
    broken = {
        f"{relative(path)} imports {name}"
        for path in files
        for name in layers.imports(path)
        if name == forbidden or name.startswith(f"{forbidden}.")
    }
    assert not broken


def test_rooms_import_downwards_and_never_in_a_circle():
    graph = layers.edges(layers.modules())
    assert layers.upward(graph) == []
    assert layers.circles(graph) == []


def test_a_circle_and_an_upward_import_are_found(tmp_path):
    """Inside functions and through packages, too."""
    files = {
        "errors.py": "def f():\n    from specjax.engine import engine",
        "engine/__init__.py": "",
        "engine/engine.py": "from specjax import errors",
        "attic.py": "",
    }
    for name, text in files.items():
        path = tmp_path / "specjax" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    graph = layers.edges(layers.modules(tmp_path))
    assert layers.circles(graph) == [("specjax.engine.engine", "specjax.errors")]
    assert layers.upward(graph) == [
        "specjax.attic: 'attic' is in no layer",
        "specjax.errors imports specjax.engine.engine, which lies above it",
    ]


def test_no_future_annotations():
    """They would turn the shapes in signatures into text, and the tests would check nothing."""
    assert not [relative(path) for path in LIBRARY if "__future__" in layers.imports(path)]


def test_the_library_reads_no_environment():
    reading = re.compile(r"(.*\.)?(environ|getenv|environb)$")
    found = {relative(p) for p in LIBRARY if any(reading.match(name) for name in attributes(p))}
    assert found <= {"specjax/files/hub.py"}, "only the cache folder may come from there"


def test_the_library_changes_no_global_configuration():
    names = re.compile(
        r"jax\.config\.update|os\.putenv|logging\.basicConfig|warnings\.simplefilter"
    )
    assert not [
        relative(p) for p in LIBRARY if any(names.fullmatch(name) for name in attributes(p))
    ]


def test_flags_are_defined_in_experiments_only():
    defining = re.compile(r"(.*\.)?(DEFINE_\w+|ArgumentParser)$")
    found = {
        relative(path)
        for path in tracked("*.py")
        if any(defining.match(name) for name in attributes(path))
    }
    assert found, "the binaries define flags"
    binaries = {"tests/ptx/check.py"}  # a tool of this repository with a command line of its own
    assert all(name.startswith("experiments/") for name in found - binaries)


def test_no_num_programs():
    """Mosaic GPU's interpreter in jax 0.11 gives wrong values for it."""
    assert not [
        relative(p) for p in LIBRARY if any(n.endswith("num_programs") for n in attributes(p))
    ]


def test_no_path_of_the_machine_that_it_was_written_on():
    if len(ROOT.parts) < 3:
        pytest.skip("the repository lies at the root of the file system")
    place = f"{ROOT.parent}/".encode()
    text = [p for p in tracked() if p.suffix not in (".safetensors", ".bin", ".pt", ".model")]
    assert not [relative(path) for path in text if place in path.read_bytes()]


def test_readme_names_the_two_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in readme
    assert "make test" in readme


def test_every_dependency_is_pinned_within_its_bounds():
    lines = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    pins = {name.replace("_", "-"): version for name, version in pins.items()}
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *extras["dev"], *extras["train"], *extras["gguf"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name]), text
    assert not [name for name in pins if name in ("torch", "triton") or name.startswith("nvidia")]


def test_the_version_is_the_one_that_is_installed():
    assert specjax.__version__ == PROJECT["version"]


def test_the_developers_python_is_one_that_is_supported():
    stated = (ROOT / ".python-version").read_text().strip()
    assert PROJECT["requires-python"] == ">=3.12"
    assert tuple(map(int, stated.split(".")[:2])) >= (3, 12)


def test_no_python_gives_one_clear_line(tmp_path):
    script = str(ROOT / ".ci" / "find-python")
    result = run(shutil.which("bash"), script, env={"PATH": str(tmp_path)})
    assert result.returncode != 0
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "no Python >= 3.12" in result.stderr


def test_an_interrupted_full_run_goes_on(tmp_path):
    record = tmp_path / "cache" / "test-full.jsonl"
    assert resume.read(record, "one") == {}
    with record.open("a") as file:
        file.write('{"passed": "a", "seconds": 1.5}\n{"passed": "b", "sec')
    assert resume.read(record, "one") == {"a": 1.5}
    assert resume.read(record, "one") == {"a": 1.5}, "the broken line is gone"
    assert resume.read(record, "two") == {}
    assert resume.read(record, "one") == {}


def test_a_full_run_is_identified_by_its_sources(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    source = tmp_path / "specjax" / "a.py"
    source.parent.mkdir()
    source.write_text("a")
    first = resume.identity(tmp_path)
    (tmp_path / "README.md").write_text("no source")
    assert resume.identity(tmp_path) == first
    source.write_text("b")
    assert resume.identity(tmp_path) != first


def test_files_stay_readable():
    long = {relative(p): len(p.read_text(encoding="utf-8").splitlines()) for p in LIBRARY}
    assert not {name: lines for name, lines in long.items() if lines > 400}
