"""A process that answers requests, and that may hang or die without taking its parent along.

Compiling and running kernels can do both, and neither can be caught inside a process. A request and its answer are JSON
objects, a line each; an answer that does not come within its seconds ends the process, and the next request starts
another. Nothing here needs JAX.
"""

import contextlib
import ctypes
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

Handler = Callable[[dict[str, Any], Callable[[str], None]], dict[str, Any]]
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {0} import serve; serve()"
_TAIL_BYTES = 2000
_PR_SET_PDEATHSIG = 1


class Lost(Exception):
    """A process that did not answer.

    Attributes:
        how: "no answer in 20 s", or how it ended.
        stage: what it last said that it was doing; "" if nothing.
        last_lines: the end of what it wrote to stderr.
    """

    def __init__(self, how: str, stage: str, last_lines: str):
        super().__init__(f"{how} ({stage})" if stage else how)
        self.how, self.stage, self.last_lines = how, stage, last_lines


class Worker:
    """Answers requests in a process of its own, started at the first one and after every loss.

    Args:
        entry: "package.module:function"; called in the process with `arguments`, it returns the handler: a function
            of a request and of `stage`, which it calls with a word on what it is about to do.
        arguments: JSON-ready.
        settings: environment variables of the process beside this one's.
        start_seconds: for starting, importing and making the handler.
    """

    def __init__(
        self,
        entry: str,
        arguments: Mapping[str, Any] | None = None,
        settings: Mapping[str, str] | None = None,
        start_seconds: float = 120.0,
    ):
        self._first = {"entry": entry, "arguments": dict(arguments or {}), "parent": os.getpid()}
        self._settings = [f"{name}={value}" for name, value in (settings or {}).items()]
        self._start_seconds = start_seconds
        self._process: subprocess.Popen | None = None
        self._buffer, self._stage = b"", ""

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to a request; {"error": text} where the handler raised.

        Raises:
            Lost: no answer in time, or the process ended. It is gone then.
        """
        if self._process is None:
            self._start()
            self._exchange(self._first, self._start_seconds)
        return self._exchange(request, seconds)

    def close(self) -> None:
        """Ends the process, and what it started, at once."""
        if self._process is None:
            return
        process, self._process = self._process, None
        if process.poll() is None:
            # It leads a process group of its own: assemblers that it started go with it.
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with contextlib.suppress(OSError):  # what a dead process did not read
            process.stdin.close()
        process.stdout.close()
        self._log.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _start(self) -> None:
        path = [os.getcwd() if place == "" else place for place in sys.path]
        command = [sys.executable, "-c", _START.format(__name__), json.dumps(path)]
        command = ["env", *self._settings, *command] if self._settings else command
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        self._buffer = b""
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )

    def _exchange(self, message: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        deadline, self._stage = time.monotonic() + seconds, ""
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:  # it ended between two requests
            raise self._lost(self._ended()) from None
        while True:
            answer = json.loads(self._line(deadline, seconds))
            if "stage" not in answer:
                return answer
            self._stage = answer["stage"]

    def _line(self, deadline: float, seconds: float) -> bytes:
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise self._lost(f"no answer in {seconds:.0f} s")
                piece = os.read(self._process.stdout.fileno(), 1 << 16)
                if not piece:
                    raise self._lost(self._ended())
                self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _ended(self) -> str:
        """How a process ended that has closed its answers."""
        try:
            status = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "it closed its answers"
        if status >= 0:
            return f"it ended with status {status}"
        try:
            return f"it was ended by {signal.Signals(-status).name}"
        except ValueError:
            return f"it was ended by signal {-status}"

    def _lost(self, how: str) -> Lost:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _TAIL_BYTES))
        text = self._log.read().decode(errors="replace")
        stage = self._stage
        self.close()
        return Lost(how, stage, text)


def serve() -> None:
    """What the process of a `Worker` runs: answers until its requests end."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever compilers print must not pass for an answer

    def send(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    first = json.loads(sys.stdin.readline())
    _end_with(first["parent"])
    handler = entry(first["entry"])(**first["arguments"])
    send({"ready": True})
    for line in sys.stdin:
        try:
            answer = handler(json.loads(line), lambda stage: send({"stage": stage}))
        except Exception as error:  # whatever lowering, a compiler or a launch raises is the answer
            answer = {"error": described(error)}
        send(answer)


def _end_with(parent: int) -> None:
    """Asks Linux to end this process when the thread that started it is gone: a hung one would not notice itself."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def entry(name: str) -> Callable:
    """The function that "package.module:function" names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def described(error: Exception) -> str:
    """An error on one line, cut to a length for tables."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}"
