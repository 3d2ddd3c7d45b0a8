"""Every family of kernels in a process of its own, which may fail to compile, compute nonsense, hang or die."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from specjax.doctor import verdicts as keeping
from specjax.doctor.verdicts import Verdict, Verdicts
from specjax.doctor.workers import Lost, Worker
from specjax.engine.program import COMMAND_BUFFERS
from specjax.pallas.matmul import specs

_logger = logging.getLogger(__name__)
# From no graphs to whole loops: what fails without graphs is not tried in them.
_MODES = tuple(reversed(COMMAND_BUFFERS))
# The parent holds most of the device's memory already; a child takes what it needs.
_SETTINGS = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
_NO_ROOM = ("RESOURCE_EXHAUSTED", "out of memory", "OUT_OF_MEMORY")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Kernels that are judged, and put into quarantine, together.

    Attributes:
        op: by which dispatch knows them: "matmul_w4a16", "tree_attention", "glue".
        backend: "mosaic" or "triton".
        entry: "package.module:function" that makes their `checker.Checker`.
        arguments: of that function, JSON-ready; default: op and backend.
    """

    op: str
    backend: str = "mosaic"
    entry: str = "specjax.doctor.cases:checker"
    arguments: Mapping[str, Any] | None = None

    @property
    def name(self) -> tuple[str, str]:
        """Unique."""
        return self.op, self.backend

    def worker(self) -> Worker:
        """A process for it."""
        given = self.arguments
        if given is None:
            given = {"op": self.op, "backend": self.backend}
        return Worker(self.entry, given, _SETTINGS)


FAMILIES = (
    *(Family(op=op) for op in ("matmul_w4a16", "tree_attention", "glue")),
    *(Family(op=op) for op in specs.ops() if op != "matmul_w4a16"),
    Family(op="matmul_w4a16", backend="triton"),
)
"""All there are; those first that most models need."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long a check may take.

    Attributes:
        case_seconds: to compile, run and compare one launch.
        total_seconds: for all families; those that are not done by then stay unchecked.
        parallel: processes at a time.
    """

    case_seconds: float = 60.0
    total_seconds: float = 300.0
    parallel: int = 4


def check(
    families: Sequence[Family] = FAMILIES,
    limits: Limits | None = None,
    on_verdict: Callable[[Verdict], None] = lambda verdict: None,
) -> Verdicts:
    """Compiles, runs and compares all families on this machine.

    Args:
        on_verdict: is told each verdict when it is known.
    """
    limits = limits or Limits()
    deadline = time.monotonic() + limits.total_seconds
    found: dict[tuple[str, str], Verdict] = {}
    with ThreadPoolExecutor(max_workers=limits.parallel) as pool:
        work = [pool.submit(_examined, family, limits, deadline) for family in families]
        for done in as_completed(work):
            verdict = done.result()
            found[verdict.op, verdict.backend] = verdict
            on_verdict(verdict)
    ordered = tuple(found[family.name] for family in families)
    return Verdicts(identity=keeping.identity(), families=ordered)


def known_or_checked(
    folder: Path,
    families: Sequence[Family] = FAMILIES,
    limits: Limits | None = None,
    on_verdict: Callable[[Verdict], None] = lambda verdict: None,
) -> Verdicts:
    """What `folder` knows of this machine; families of which it knows nothing are checked, and kept there.

    Args:
        folder: of verdicts; made if it does not exist. Where it cannot be written the check comes again next time.
    """
    known = keeping.read(folder, keeping.identity())
    if known is not None and known.complete(family.name for family in families):
        return known
    before = {(v.op, v.backend): v for v in known.families} if known else {}
    missing = [family for family in families if family.name not in before]
    fresh = check(missing, limits, on_verdict)
    merged = before | {(v.op, v.backend): v for v in fresh.families}
    result = replace(fresh, families=tuple(merged[family.name] for family in families))
    try:
        keeping.write(folder, result)
    except OSError as error:
        _logger.warning("the verdicts on kernels cannot be kept in %s: %s", folder, error)
    return result


def _examined(family: Family, limits: Limits, deadline: float) -> Verdict:
    begin = time.monotonic()
    with family.worker() as worker:
        examination = _Examination(worker=worker, limits=limits, deadline=deadline)
        verdict = examination.verdict(family)
    return replace(verdict, seconds=round(time.monotonic() - begin, 1))


@dataclass(kw_only=True)
class _Examination:
    worker: Worker
    limits: Limits
    deadline: float
    graphs: dict[str, str] = field(default_factory=dict)

    def verdict(self, family: Family) -> Verdict:
        """Of one family: its cases without graphs, then all of them in a loop with each kind of graph."""
        base = Verdict(op=family.op, backend=family.backend, state="unchecked")
        try:
            listed = self._ask({"list": True})
        except (Lost, TimeoutError) as error:
            # Nothing of the family has run: the machine refuses a second process, or is not well at all.
            tail = " ".join(getattr(error, "last_lines", "").split())[-300:]
            return replace(base, reason=f"its process did not start: {error} {tail}".strip())
        if "error" in listed:
            return replace(base, reason=listed["error"])
        if listed["unavailable"] is not None:
            return replace(base, state="unavailable", reason=listed["unavailable"])
        base = replace(base, cases=len(listed["cases"]))
        without, *with_graphs = _MODES
        try:
            for index in range(base.cases):
                reason = self._failure({"buffers": without, "case": index})
                if reason is not None:
                    state = "unchecked" if _no_room(reason) else "fails"
                    return replace(base, state=state, reason=reason)
            for mode in with_graphs:
                reason = self._failure({"buffers": mode})
                if reason is not None and not _no_room(reason):
                    self.graphs[mode] = reason
        except TimeoutError as error:
            return replace(base, reason=str(error), graphs=dict(self.graphs))
        return replace(base, state="passes", graphs=dict(self.graphs))

    def _failure(self, request: dict[str, Any]) -> str | None:
        try:
            answer = self._ask(request)
        except Lost as error:
            return str(error)
        if "error" in answer:  # after a fault nothing runs in that process
            self.worker.close()
            return answer["error"]
        return answer["reason"]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time for all families was up")
        try:
            return self.worker.ask(request, min(self.limits.case_seconds, left))
        except Lost as error:
            if left < self.limits.case_seconds and time.monotonic() >= self.deadline:
                raise TimeoutError("the time for all families was up") from error
            raise


def _no_room(reason: str) -> bool:
    return any(sign in reason for sign in _NO_ROOM)
