"""Choosing the backend of an op: a named one is obeyed or refused, "auto" says what it took."""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax

from specjax import errors

Backend = Literal["auto", "xla", "mosaic", "triton"]
BACKENDS = ("auto", "xla", "mosaic", "triton")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to run an op.

    Attributes:
        backend: "xla", "mosaic" or "triton".
        run: the function; it takes the arguments of the op's public function without `backend`.
        refuses: given the same arguments, why this implementation cannot take them, or None.
    """

    backend: str
    run: Callable[..., Any]
    refuses: Callable[..., str | None] = lambda *args, **kwargs: None


def run(op: str, backend: str, implementations: Sequence[Implementation], *args, **kwargs):
    """Runs `op` on `backend`, or with "auto" on the first implementation that accepts.

    Raises:
        SpecjaxError: the backend named does not exist, has no implementation of this op, or refuses
            these arguments.
    """
    offered = [implementation.backend for implementation in implementations]
    if backend not in BACKENDS:
        raise errors.SpecjaxError(f"backend={backend!r} is unknown; known: {', '.join(BACKENDS)}")
    if backend not in ("auto", *offered):
        raise errors.SpecjaxError(
            f"{op} has no implementation for backend={backend!r}; "
            f"available: {', '.join(offered)}, auto"
        )
    reasons = [f"{name}: not implemented" for name in BACKENDS[1:] if name not in offered]
    for implementation in implementations:
        if backend not in ("auto", implementation.backend):
            continue
        reason = implementation.refuses(*args, **kwargs)
        if reason is None:
            if backend == "auto":
                _announce(op, implementation.backend, "; ".join(reasons))
            return implementation.run(*args, **kwargs)
        reasons.append(f"{implementation.backend}: {reason}")
    raise errors.SpecjaxError(f"{op} cannot run with backend={backend!r} ({'; '.join(reasons)})")


@functools.cache
def _announce(op: str, backend: str, reasons: str) -> None:
    """Logs a choice once per process; as a warning where the choice is slow (XLA on a GPU)."""
    slow = backend == "xla" and jax.default_backend() == "gpu"
    message = f"{op}: backend auto runs {backend}" + (f" ({reasons})" if reasons else "")
    _logger.log(logging.WARNING if slow else logging.INFO, message)
