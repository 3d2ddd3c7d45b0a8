"""Commands with little time: each a process with its own limit, its result on disk as soon as it is known.

Nothing here needs JAX, so that nothing of it can hang. A process that is late is ended together with what it started.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

State = Literal["done", "failed", "timed out", "missing", "no time"]
_TAIL_BYTES = 2000


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command.

    Attributes:
        name: of the step, and of its log.
        command: words; "{out}" in one stands for the folder of results.
        seconds: it may take.
        why: what its result decides, for whoever reads the rows.
    """

    name: str
    command: Sequence[str]
    seconds: float
    why: str = ""


@dataclass(kw_only=True)
class Session:
    """Runs steps one after the other, or those of one tuple at a time, until the time is up.

    Attributes:
        folder: of results: `session.jsonl`, and NAME.log of each step.
        seconds: for all.
        settings: environment variables of the processes beside this one's.
        most_bytes: that the folder may hold; logs are cut, then the largest files are dropped.
        tell: is called with every row.
    """

    folder: Path
    seconds: float
    settings: Mapping[str, str] = field(default_factory=dict)
    most_bytes: int = 64 << 20
    tell: Callable[[dict[str, Any]], None] = lambda row: None

    def run(self, steps: Sequence[Step | tuple[Step, ...]]) -> list[dict[str, Any]]:
        """A row for every step."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._end, rows = time.monotonic() + self.seconds, []
        for entry in steps:
            group = entry if isinstance(entry, tuple) else (entry,)
            with ThreadPoolExecutor(max_workers=len(group)) as pool:
                rows += list(pool.map(self._step, group))
            self._trim()
        return rows

    def _step(self, step: Step) -> dict[str, Any]:
        row: dict[str, Any] = {"step": step.name, "why": step.why}
        left = self._end - time.monotonic()
        if left <= 1.0:
            return self._keep(row | {"state": "no time"})
        limit, begin = min(step.seconds, left), time.monotonic()
        log = self.folder / f"{step.name}.log"
        self._keep(row | {"state": "started", "limit": round(limit, 1)})
        state, status = self._process(step, limit, log)
        row |= {"state": state, "status": status, "seconds": round(time.monotonic() - begin, 1)}
        return self._keep(row | {"last_lines": _tail(log) if state != "done" else ""})

    def _process(self, step: Step, limit: float, log: Path) -> tuple[State, int | None]:
        command = [word.replace("{out}", str(self.folder)) for word in step.command]
        with log.open("wb") as file:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **self.settings},
                    start_new_session=True,
                )
            except OSError as error:
                file.write(str(error).encode())
                return "missing", None
            try:
                status = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                return "timed out", _end(process)
        return ("done" if status == 0 else "failed"), status

    def _keep(self, row: dict[str, Any]) -> dict[str, Any]:
        row = {"at": round(self.seconds - (self._end - time.monotonic()), 1), **row}
        with (self.folder / "session.jsonl").open("ab") as file:
            file.write(
                json.dumps(row).encode() + b"\n"
            )  # one write: rows of parallel steps stay whole
        self.tell(row)
        return row

    def _trim(self) -> None:
        """Keeps the folder within its size, results before logs before the rest."""
        sizes = {path: path.stat().st_size for path in self.folder.rglob("*") if path.is_file()}
        excess = sum(sizes.values()) - self.most_bytes
        order = sorted(sizes, key=lambda path: (path.suffix == ".jsonl", -sizes[path]))
        for path in order:
            if excess <= 0 or path.suffix == ".jsonl":
                return
            path.unlink()
            excess -= sizes[path]
            self._keep({"step": "room", "state": "dropped", "file": path.name})


def _end(process: subprocess.Popen) -> int:
    """Ends a process and its group; its status."""
    os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _tail(log: Path) -> str:
    data = log.read_bytes()[-_TAIL_BYTES:]
    return data.decode(errors="replace")
