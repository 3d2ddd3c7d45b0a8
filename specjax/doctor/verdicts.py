"""What is known of the kernels on a machine, kept in a folder until one of the versions involved changes."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import jax
import jaxlib

from specjax import pallas
from specjax.engine.program import COMMAND_BUFFERS, CommandBuffers
from specjax.pallas.dispatch import Name, Policy, Quarantined
from specjax.version import __version__

State = Literal["passes", "fails", "unavailable", "unchecked"]
_DRIVER = Path("/proc/driver/nvidia/version")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of a family.

    Attributes:
        op, backend: the family.
        state: "passes"; "fails": it must not run; "unavailable": it is not for this machine; "unchecked": time was up,
            or the machine had no room for the check.
        reason: why it does not pass.
        graphs: failures that come with CUDA graphs only, by `command_buffers` ("body", "loop").
        cases: shapes that were compared.
        seconds: it took.
    """

    op: str
    backend: str
    state: State
    reason: str | None = None
    graphs: Mapping[str, str] = field(default_factory=dict)
    cases: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """What is known of a machine.

    Attributes:
        identity: of the machine and the versions, see `identity`.
        families: verdicts in the order of the check.
    """

    identity: Mapping[str, Any]
    families: tuple[Verdict, ...] = ()

    def policy(self, backend: Name = "auto") -> Policy:
        """The choice of `backend` without the families that fail."""
        failed = [verdict for verdict in self.families if verdict.state == "fails"]
        return Policy(
            backend=backend,
            quarantine=tuple(
                Quarantined(op=v.op, backend=v.backend, reason=v.reason) for v in failed
            ),
        )

    def command_buffers(self) -> CommandBuffers:
        """The most that CUDA graphs may hold here: "loop" unless a family that passes fails in one."""
        passing = [verdict for verdict in self.families if verdict.state == "passes"]
        return next(mode for mode in COMMAND_BUFFERS if not any(mode in v.graphs for v in passing))

    def complete(self, families: Iterable[tuple[str, str]]) -> bool:
        """Whether every family has been judged."""
        known = {(v.op, v.backend) for v in self.families if v.state != "unchecked"}
        return set(families) <= known


def identity() -> dict[str, Any]:
    """Device, driver and versions, and a digest of the kernels' sources: what verdicts depend on."""
    gpu = jax.devices()[0]
    driver = _DRIVER.read_text().splitlines()[0] if _DRIVER.is_file() else ""
    return {
        "device": gpu.device_kind,
        "compute_capability": str(getattr(gpu, "compute_capability", "")),
        "driver": driver,
        "platform": gpu.client.platform_version,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "triton": _version("triton"),
        "jax_triton": _version("jax-triton"),
        "specjax": __version__,
        "kernels": _sources(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _sources() -> str:
    digest, root = hashlib.sha256(), Path(pallas.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def path_of(folder: Path, identity: Mapping[str, Any]) -> Path:
    """The file of a machine in a folder of verdicts."""
    text = json.dumps(dict(identity), sort_keys=True)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def read(folder: Path, identity: Mapping[str, Any]) -> Verdicts | None:
    """What is known; None where nothing is, or the file is damaged (which a warning says)."""
    path = path_of(folder, identity)
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        families = tuple(Verdict(**entry) for entry in stored["families"])
        if any(v.state == "fails" and not isinstance(v.reason, str) for v in families):
            raise ValueError("a family fails without a reason")
        if stored["identity"] != dict(identity):
            raise ValueError("it is another machine's")
    except (ValueError, TypeError, KeyError, OSError) as error:
        _logger.warning("%s is damaged (%s): the kernels are checked again", path, error)
        return None
    return Verdicts(identity=identity, families=families)


def write(folder: Path, verdicts: Verdicts) -> Path:
    """Keeps verdicts but those that say nothing; the file appears whole.

    Raises:
        OSError: the folder cannot be written.
    """
    path = path_of(folder, verdicts.identity)
    kept = [asdict(v) for v in verdicts.families if v.state != "unchecked"]
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"identity": dict(verdicts.identity), "families": kept}, indent=1)
    handle, partial = tempfile.mkstemp(prefix=".verdicts.", dir=folder)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text + "\n")
    os.replace(partial, path)
    return path
