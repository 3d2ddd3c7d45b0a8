"""Choosing the backend of an op: a named one is obeyed or refused, "auto" says what it took.

What is known to fail on a machine (`specjax.doctor`) comes with the choice, as a value: a `Policy` in place of a name.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax

from specjax import errors

Name = Literal["auto", "xla", "mosaic", "triton"]
BACKENDS = ("auto", "xla", "mosaic", "triton")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Quarantined:
    """A family of kernels that must not run on a machine.

    Attributes:
        op: the family, by the name of its op: "matmul_w4a16", "tree_attention", "glue".
        backend: "mosaic" or "triton".
        reason: what it did.
    """

    op: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op} {self.backend}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The backend that ops run on, and what of it must not run here.

    Attributes:
        backend: "auto", or the one to take.
        quarantine: families that are refused.
        tuned: tables of tiles that were measured on this machine, as pairs of op and JSON text (see `tuned.parse`);
            they go before those of this package.
    Raises:
        SpecjaxError: there is no such backend.
    """

    backend: Name = "auto"
    quarantine: tuple[Quarantined, ...] = ()
    tuned: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        if self.backend not in BACKENDS:
            raise errors.SpecjaxError(
                f"backend={self.backend!r} is unknown; known: {', '.join(BACKENDS)}"
            )

    def refuses(self, op: str, backend: str) -> str | None:
        """Why `backend` must not run `op`, or None."""
        for entry in self.quarantine:
            if (entry.op, entry.backend) == (op, backend):
                return (
                    f"family {op} is in quarantine on this machine: {entry.reason} "
                    "(python -m experiments.doctor checks again; --nodoctor ignores it)"
                )
        return None

    def table(self, op: str) -> str | None:
        """The text of an op's measured tiles, or None."""
        return dict(self.tuned).get(op)


Backend = Name | Policy


def policy(backend: Backend) -> Policy:
    """A name or a policy as a policy.

    Raises:
        SpecjaxError: there is no such backend.
    """
    return backend if isinstance(backend, Policy) else Policy(backend=backend)


def permits(backend: Backend, op: str, implementation: str) -> bool:
    """Whether `implementation` may run `op` under a choice of backend; says once if quarantine forbids it."""
    chosen = policy(backend)
    if chosen.backend not in ("auto", implementation):
        return False
    reason = chosen.refuses(op, implementation)
    if reason is not None:
        _warn(f"{op}: without {implementation}: {reason}")
    return reason is None


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to run an op.

    Attributes:
        backend: "xla", "mosaic" or "triton".
        run: the function; it takes the arguments of the op's public function without `backend`.
        refuses: given the same arguments, why this implementation cannot take them, or None.
        tunable: `run` takes `tuned`, the policy's table of the op or None.
    """

    backend: str
    run: Callable[..., Any]
    refuses: Callable[..., str | None] = lambda *args, **kwargs: None
    tunable: bool = False


def run(op: str, backend: Backend, implementations: Sequence[Implementation], *args, **kwargs):
    """Runs `op` on `backend`, or with "auto" on the first implementation that accepts.

    Args:
        backend: a name, or a policy, whose quarantine counts as a refusal.

    Raises:
        SpecjaxError: the backend named does not exist, has no implementation of this op, or refuses
            these arguments.
    """
    offered = [implementation.backend for implementation in implementations]
    chosen = policy(backend)
    backend = chosen.backend
    if backend not in ("auto", *offered):
        raise errors.SpecjaxError(
            f"{op} has no implementation for backend={backend!r}; "
            f"available: {', '.join(offered)}, auto"
        )
    reasons = [f"{name}: not implemented" for name in BACKENDS[1:] if name not in offered]
    forbidden = False
    for implementation in implementations:
        if backend not in ("auto", implementation.backend):
            continue
        reason = chosen.refuses(op, implementation.backend)
        forbidden |= reason is not None
        reason = reason or implementation.refuses(*args, **kwargs)
        if reason is None:
            if backend == "auto":
                _announce(op, implementation.backend, "; ".join(reasons), forbidden)
            tiles = {"tuned": chosen.table(op)} if implementation.tunable else {}
            return implementation.run(*args, **kwargs, **tiles)
        reasons.append(f"{implementation.backend}: {reason}")
    raise errors.SpecjaxError(f"{op} cannot run with backend={backend!r} ({'; '.join(reasons)})")


@functools.cache
def _announce(op: str, backend: str, reasons: str, forbidden: bool) -> None:
    """Logs a choice once per process; as a warning where it is slow (XLA on a GPU) or quarantine made it."""
    slow = forbidden or (backend == "xla" and jax.default_backend() == "gpu")
    message = f"{op}: backend auto runs {backend}" + (f" ({reasons})" if reasons else "")
    _logger.log(logging.WARNING if slow else logging.INFO, message)


@functools.cache
def _warn(message: str) -> None:
    """Logs a warning once per process."""
    _logger.warning(message)
