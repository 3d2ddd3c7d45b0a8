"""pytest plugin of `make test-full`: tests that passed on the same sources are not run again.

`.cache/test-full.jsonl` holds a first line that identifies sources and environment, then one line
per passed test, written as it ends; with other sources it starts anew. Failed and skipped tests
always run again.
"""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / ".cache" / "test-full.jsonl"
LOG = RECORD.with_suffix(".log")
_SOURCES = ("specjax", "experiments", "tests", "pyproject.toml", "requirements-dev.txt")


def pytest_configure(config: pytest.Config) -> None:
    """Registers the plugin; a process of pytest-xdist gets the list from the controlling one."""
    config.pluginmanager.register(Resume(config), "specjax-resume")


class Resume:
    """Reads and writes the record, and leaves out what it lists."""

    def __init__(self, config: pytest.Config):
        self.worker = getattr(config, "workerinput", None)
        self.begin = time.monotonic()
        self.call_passed: set[str] = set()
        self.passed = (
            json.loads(self.worker["passed"]) if self.worker else read(RECORD, identity(ROOT))
        )
        self.before = dict(self.passed)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node) -> None:
        """Every process must leave out the same tests."""
        node.workerinput["passed"] = json.dumps(self.before)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list) -> None:
        done = [item for item in items if item.nodeid in self.before]
        items[:] = [item for item in items if item.nodeid not in self.before]
        config.hook.pytest_deselected(items=done)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.worker or not report.passed:
            return
        if report.when == "call":
            self.call_passed.add(report.nodeid)
            self.passed[report.nodeid] = report.duration
        elif report.when == "teardown" and report.nodeid in self.call_passed:
            line = {"passed": report.nodeid, "seconds": round(self.passed[report.nodeid], 3)}
            with RECORD.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.before:
            session.exitstatus = pytest.ExitCode.OK

    def pytest_terminal_summary(self, terminalreporter) -> None:
        now = time.monotonic() - self.begin
        tests = sum(self.passed.values())
        terminalreporter.write_line(
            f"test-full: {len(self.before)} tests had passed before on these sources and were left out, "
            f"{len(self.passed) - len(self.before)} passed now in {now:.0f} s; all together "
            f"{tests:.0f} s of test time; log: {LOG.relative_to(ROOT)}"
        )


def identity(root: Path) -> str:
    """SHA-256 over the sources (tracked or not, but not ignored) and the versions that they run on."""
    digest = hashlib.sha256(f"{sys.version} {jax.__version__}".encode())
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *_SOURCES]
    names = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout
    for name in sorted(set(names.decode().split("\0"))):
        if name and (root / name).is_file():
            digest.update(f"{name}\0".encode() + (root / name).read_bytes())
    return digest.hexdigest()


def read(record: Path, key: str) -> dict[str, float]:
    """Seconds by passed test if the record is of these sources; else starts a new record.

    A last line that an interruption cut off is dropped.
    """
    lines = record.read_text(encoding="utf-8").split("\n")[:-1] if record.is_file() else []
    if not lines or json.loads(lines[0]) != {"sources": key}:
        lines = [json.dumps({"sources": key})]
    record.parent.mkdir(exist_ok=True)
    record.write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = map(json.loads, lines[1:])
    return {row["passed"]: row["seconds"] for row in rows}
