"""Runs a program that a model wrote in a process of its own, with limits on time, memory and files.

The limits protect against accidents, not against malice: the program has the user's permissions and can reach the
network. Binaries ask for --allow_code_execution first.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile

PASSED = "passed"
_OUTPUT_LIMIT = 300

# The child limits itself before it runs anything; the token tells a program that reached its end from one that exits.
_CHILD = """
import io, os, resource, sys
seconds, megabytes = int(sys.argv[1]), int(sys.argv[2])
token, program = sys.stdin.read().split("\\n", 1)
resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
out, sys.stdout, sys.stdin = os.dup(1), io.StringIO(), io.StringIO()
try:
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})
except BaseException as error:
    os.write(2, f"{type(error).__name__}: {error}".encode(errors="replace")[:2000])
    os._exit(1)
os.write(out, token.encode())
os._exit(0)
"""


def run(program: str, timeout_s: float = 3.0, memory_mb: int = 1024) -> str:
    """Runs a Python program; returns `PASSED`, "timed out", or "failed: " with the reason.

    Args:
        timeout_s: wall-clock limit; processor time is limited to the next whole second.
        memory_mb: limit of the address space, in MiB.
    """
    token = secrets.token_hex(16)
    limits = [str(int(timeout_s) + 1), str(memory_mb)]
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", _CHILD, *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            out, errors = child.communicate(f"{token}\n{program}".encode(), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            _end(child)
    if child.returncode == 0 and out.decode(errors="replace") == token:
        return PASSED
    reason = " ".join(errors.decode(errors="replace").split())[:_OUTPUT_LIMIT]
    if child.returncode == -signal.SIGXCPU:
        return "timed out"
    return f"failed: {reason or f'exit code {child.returncode}'}"


def _end(child: subprocess.Popen) -> None:
    """Ends the child and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
