"""What WORKSPACE.md, README.md and docs/ say: every file has its line, commands parse, tables are up to date."""

import ast
import importlib
import importlib.util
import re
import tomllib
from collections import Counter

import pytest
from absl import flags

import specjax
from tests import docs_commands, docs_tables, layers, paths
from tests.experiments import binaries

ROOT = paths.REPOSITORY
WORKSPACE = (ROOT / "WORKSPACE.md").read_text(encoding="utf-8")


def listed() -> Counter[str]:
    """Files named in WORKSPACE.md's list: the first cell of every row, below the folder of its heading."""
    names, folder = Counter(), None
    for line in WORKSPACE.partition("\n## Every file\n")[2].splitlines():
        if heading := re.fullmatch(r"### `(.+/)`", line):
            folder = heading[1]
        elif row := re.fullmatch(r"\| `(.+\.py)` \| (\S.*) \|", line):
            names[folder + row[1]] += 1
    return names


def present() -> set[str]:
    """Modules of specjax and experiments, and what tests share."""
    found = {p for room in ("specjax", "experiments", "tests") for p in (ROOT / room).rglob("*.py")}
    names = {p.relative_to(ROOT).as_posix() for p in found if p.name != "__init__.py"}
    return {name for name in names if not name.rpartition("/")[2].startswith("test_")}


def test_every_file_has_one_line_in_the_workspace():
    names, files = listed(), present()
    assert len(files) > 200
    wrong = {
        "add a line for": sorted(files - set(names)),
        "there is no": sorted(set(names) - files),
        "named twice": sorted(name for name, count in names.items() if count > 1),
    }
    wrong = {what: found for what, found in wrong.items() if found}
    assert not wrong, f"WORKSPACE.md, 'Every file': {wrong}"


def test_the_rooms_of_the_workspace_are_the_layers():
    table = WORKSPACE.partition("| room | what it is for |\n|---|---|\n")[2].partition("\n\n")[0]
    rows = [re.fullmatch(r"\| `(\w+)` \| (.+) \|", line).groups() for line in table.splitlines()]
    assert rows == list(layers.LAYERS), "copy the rooms of tests/layers.py"


def test_new_names_of_the_changelog_exist():
    """The right-hand sides of its tables, so that whoever follows it arrives."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    targets = re.findall(r"^\| `[^|]+` \| `([^|`]+)`", text, re.M)
    assert len(targets) > 80
    assert not [name for name in targets if not _exists(name)]


def test_the_public_names_are_those_that_the_changelog_says_stay():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    section = text.partition("### What stays\n")[2].partition("\n###")[0]
    said = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", section))))
    assert set(specjax.__all__) <= said
    for module in ("tokenizer", "scoring", "quant.activations"):
        assert importlib.import_module(f"specjax.{module}")


def _exists(name: str) -> bool:
    """Whether a path, a module, or a name in a module is there."""
    if (ROOT / name).exists():
        return True
    place = ROOT / name.replace(".", "/")
    if place.with_suffix(".py").is_file() or (place / "__init__.py").is_file():
        return True
    module, _, attribute = name.rpartition(".")
    file = (ROOT / module.replace(".", "/")).with_suffix(".py")
    return (
        file.is_file() and re.search(rf"\b(def|class) {attribute}\b", file.read_text()) is not None
    )


PAGES = docs_tables.pages()
BLOCKS = [block for page in (*PAGES, ROOT / "WORKSPACE.md") for block in docs_commands.blocks(page)]
INVOCATIONS = [
    (block.page, words)
    for block in BLOCKS
    if block.language == "bash"
    for words in docs_commands.invocations(block)
]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_readme_is_short_and_every_page_is_linked_from_it():
    readme = PAGES[0].read_text(encoding="utf-8")
    assert readme.count("\n") <= 130
    assert [page.name for page in PAGES[1:] if f"](docs/{page.name})" not in readme] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_has_commands_that_the_script_runs():
    runnable = {block.page for block in BLOCKS if block.runnable}
    # No GPU here; what its page shows has been run where it says so.
    assert {page.name for page in PAGES} - runnable <= {"gpu.md", "README.md", "add.md"}


def test_every_command_exists_and_its_flags_parse():
    assert len(INVOCATIONS) > 40
    wrong = {
        f"{page}: {' '.join(words)[:100]}": found
        for page, words in INVOCATIONS
        if (found := _wrong(words))
    }
    assert not wrong


def _wrong(words: list[str]) -> str | None:
    """What is the matter with a command of the pages."""
    program, *rest = words
    if program == "make":
        unknown = [word for word in rest if "=" not in word and word not in TARGETS]
        return f"no target {unknown}" if unknown else None
    if program in ("pip", "source", "cd", "cat"):
        asked = re.findall(r"specjax\[(\w+)\]", " ".join(rest))
        return f"no extra {asked}" if set(asked) - set(EXTRAS) else None
    if program == "curl" and any(w.startswith("http://127.0.0.1:8000/") for w in rest):
        return None
    if not program.endswith("python") or rest[:1] != ["-m"]:
        return "neither make, pip nor python -m"
    module, arguments = rest[1], rest[2:]
    if module == "experiments.lm_eval_adapter" or module.startswith(("tests.", "pytest")):
        return None if module == "pytest" or _exists(module) else f"no module {module}"
    name = module.removeprefix("experiments.")
    if name not in binaries.with_flags():
        return f"no binary {module}"
    values = binaries.flags_of(binaries.load(name))
    try:
        left = values([module, *arguments])[1:]
    except flags.Error as error:
        return str(error)
    return f"unexpected {left}" if left else None


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("python -m experiments.generate --model=m --promt=x", "promt"),
        ("python -m experiments.generate --model=m --dtype=float64", "float64"),
        ("python -m experiments.generate --prompt=x", "model"),
        ("python -m experiments.generat --model=m", "no binary"),
        ("python -m experiments.generate --model=m stray", "stray"),
        ("make tests", "tests"),
        ("pip install specjax[evil]", "evil"),
        ("curl somewhere", "neither"),
    ],
)
def test_a_wrong_command_is_found(command, wrong):
    block = docs_commands.Block(
        page="x.md", language="bash", runnable=False, text=f"make demo && \\\n  {command}  # why\n"
    )
    first, second = docs_commands.invocations(block)
    assert _wrong(first) is None
    assert wrong in _wrong(second)


def test_loops_are_seen_through():
    text = (
        "for a in x y; do for b in z; do\n  python -m p --q=$a-$b \\\n    --r='1 2'\ndone; done\n"
    )
    block = docs_commands.Block(page="x.md", language="bash", runnable=True, text=text)
    assert list(docs_commands.invocations(block)) == [["python", "-m", "p", "--q=$a-$b", "--r=1 2"]]
    assert block.commands() == [text]


def test_python_blocks_compile_and_their_imports_resolve():
    found = [block for block in BLOCKS if block.language == "python"]
    assert found
    for block in found:
        for node in ast.walk(compile(block.text, block.page, "exec", ast.PyCF_ONLY_AST)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name) or importlib.util.find_spec(
                        f"{node.module}.{alias.name}"
                    )
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "specjax":
                assert hasattr(specjax, node.attr), f"{block.page}: specjax.{node.attr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_generated_tables_are_up_to_date(page):
    text = page.read_text(encoding="utf-8")
    assert docs_tables.renewed(text) == text, "python -m tests.docs_tables --write"


def test_a_stale_table_is_renewed_and_every_table_is_used():
    text = "Before.\n\n<!-- table: schemes -->\nold\n<!-- end -->\n\nAfter.\n"
    new = docs_tables.renewed(text)
    assert new.startswith("Before.\n\n<!-- table: schemes -->\n| scheme |")
    assert "old" not in new
    assert new.endswith("|\n<!-- end -->\n\nAfter.\n")
    assert docs_tables.renewed(new) == new
    everything = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [
        name for name in docs_tables.TABLES if f"<!-- table: {name} -->" not in everything
    ] == []


def test_a_page_goes_on_where_it_stopped_and_starts_anew_where_a_command_changed(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(docs_commands, "FOLDER", tmp_path / "runs")
    page = tmp_path / "page.md"
    step = "```bash run\necho {} >> log\n{}\n```\n"
    ran = lambda: (tmp_path / "runs" / "page" / "log").read_text().split()
    page.write_text(step.format("one", "test -e gate"))
    assert [seconds is None for _, seconds, _ in docs_commands.run_page(page, False)] == [
        False,
        True,
    ]
    (tmp_path / "runs" / "page" / "gate").touch()
    results = list(docs_commands.run_page(page, False))
    assert [seconds is None for _, seconds, _ in results] == [False, False]
    assert ran() == ["one"]
    page.write_text(step.format("two", "test -e gate"))
    list(docs_commands.run_page(page, False))
    assert ran() == ["one", "two"]
    assert (tmp_path / "runs" / "page" / "DATA" / "gsm8k" / "test.jsonl").is_file()
    assert len((tmp_path / "runs" / "page" / "text.jsonl").read_text().splitlines()) > 20
