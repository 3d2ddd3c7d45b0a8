"""The commands of README.md and docs/: found for the tests, and run by `python -m tests.docs_commands [PAGE ...]`.

Blocks of code that open with ```bash run or ```python run are run in order, each page in a folder of its own below
.cache/docs, where the repository's folders are linked and `inputs` has put what the pages presuppose. Interrupted or
started again, a page goes on behind what has been run with these commands; --fresh starts anew.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import docs_tables, paths
from tests.experiments import benchmark_data

ROOT = paths.REPOSITORY
FOLDER = ROOT / ".cache" / "docs"
_BLOCK = re.compile(r"^```(\w+)( run)?\n(.*?)^```$", re.M | re.S)
_LINKED = ("experiments", "specjax", "tests", "README.md", "WORKSPACE.md", "docs", "Makefile")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block of code in a page.

    Attributes:
        page: file name of the page.
        language: "bash" or "python".
        runnable: whether the script runs it.
        text: what stands between the fences.
    """

    page: str
    language: str
    runnable: bool
    text: str

    def commands(self) -> list[str]:
        """The commands of a shell block, continued lines joined; a loop or a python block is one."""
        if self.language != "bash" or re.search(r"^for ", self.text, re.M):
            return [self.text]
        lines = re.sub(r"\\\n\s*", " ", self.text).split("\n")
        return [line for line in lines if line.strip() and not line.startswith("#")]


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that are shell or Python, in order."""
    found = _BLOCK.findall(page.read_text(encoding="utf-8"))
    return [
        Block(page=page.name, language=language, runnable=bool(run), text=text)
        for language, run, text in found
        if language in ("bash", "python")
    ]


def invocations(block: Block) -> Iterator[list[str]]:
    """Words of every program that a shell block calls, e.g. ["python", "-m", "experiments.generate", "--model=x"]."""
    text = re.sub(r"\\\n\s*", " ", block.text)
    for line in text.split("\n"):
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in (*lexer, ";"):
            if set(word) <= set(";&|"):
                while words and words[0] in ("do", "done", "then"):
                    words.pop(0)
                if words and words[0] != "for":
                    yield words
                words = []
            else:
                words.append(word)


def inputs(folder: Path) -> None:
    """Fills a page's folder: links to the repository, and small files under the names that pages use.

    text.jsonl (documents of this repository), prompts.jsonl (user turns), DATA/ (benchmarks of a few questions).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in _LINKED:
        (folder / name).symlink_to(ROOT / name)
    pages = [*docs_tables.pages(), ROOT / "WORKSPACE.md"]
    parts = [part for page in pages for part in page.read_text(encoding="utf-8").split("\n\n")]
    documents = [{"text": " ".join(part.split())} for part in parts if len(part) > 200]
    turns = [
        {"id": i, "prompt": f"Write three sentences about {about}."}
        for i, about in enumerate(
            ("rivers", "bridges", "winter", "the moon", "bread", "chess", "trains", "bees")
        )
    ]
    for name, rows in {"text.jsonl": documents, "prompts.jsonl": turns}.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")
    benchmark_data.write(folder / "DATA")


def run_page(page: Path, fresh: bool) -> Iterator[tuple[str, float | None, str]]:
    """Runs a page's commands up to the first that fails.

    Yields:
        per command: its first line, the seconds it took (None: it did not end well), and "" or what it wrote last.
    """
    folder = FOLDER / page.stem
    if fresh and folder.exists():
        shutil.rmtree(folder)
    if not folder.exists():
        inputs(folder)
    log = folder / "done.json"
    done = json.loads(log.read_text()) if log.exists() else {}
    key = ""
    for block in (block for block in blocks(page) if block.runnable):
        for command in block.commands():
            key = hashlib.sha256((key + command).encode()).hexdigest()
            if key not in done:
                begin = time.perf_counter()
                ended = _run(block.language, command, folder)
                if ended.returncode:
                    tail = "\n".join((ended.stdout + ended.stderr).splitlines()[-12:])
                    yield _short(command), None, tail
                    return
                done[key] = time.perf_counter() - begin
                log.write_text(json.dumps(done))
            yield _short(command), done[key], ""


def _run(language: str, command: str, folder: Path) -> subprocess.CompletedProcess:
    python = Path(sys.executable)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # Programs that several commands compile are compiled once.
        "JAX_COMPILATION_CACHE_DIR": str(FOLDER / "compiled"),
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    program = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [str(python), "-c"]
    return subprocess.run(
        [*program, command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def _short(command: str) -> str:
    line = " ".join(command.split())
    return line if len(line) <= 90 else f"{line[:87]}..."


def main(arguments: Sequence[str]) -> int:
    """Runs the named pages (README, generate, ...; default: all) and prints the table; 1 where a command failed."""
    named = {argument.removesuffix(".md") for argument in arguments if argument[:2] != "--"}
    pages = docs_tables.pages()
    unknown = named - {page.stem for page in pages}
    if unknown:
        print(f"error: {', '.join(sorted(unknown))}: pages are {', '.join(p.stem for p in pages)}")
        return 2
    failed = False
    for page in pages:
        if named and page.stem not in named:
            continue
        for command, seconds, output in run_page(page, "--fresh" in arguments):
            took = "failed" if seconds is None else f"{seconds:7.1f} s"
            print(f"{page.stem:16} {took:>9}  {command}", flush=True)
            if seconds is None:
                failed = True
                print(output)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
