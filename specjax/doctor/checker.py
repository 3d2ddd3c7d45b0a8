"""One family of kernels, compiled, run and compared with its reference: what goes on in a process of the doctor."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from specjax.engine.program import gpu_options

# Times around the loop in which kernels run as they do when decoding.
_TURNS = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """One launch at one shape.

    Attributes:
        name: of the shape.
        kernel: arguments -> array or arrays.
        reference: the same, in XLA.
        arguments: arrays.
        tolerance: RMS of the error over RMS of the result.
    """

    name: str
    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    arguments: tuple
    tolerance: float


@dataclass(kw_only=True)
class Checker:
    """Handler of the requests of `doctor.check`.

    Attributes:
        cases: of the family.
        unavailable: why the family cannot run on this machine; None if it can.
    """

    cases: Sequence[Case] = ()
    unavailable: str | None = None
    _wanted: dict[int, list[np.ndarray]] = field(default_factory=dict)

    def __call__(self, request: dict[str, Any], stage: Callable[[str], None]) -> dict[str, Any]:
        """{"list": True}: names of the cases, or why there are none. {"buffers": mode, "case": index}: one case.
        {"buffers": mode}: all of them in one loop. Both are run twice; "reason" is None where all is well.
        """
        if "list" in request:
            stage("starting the device")
            assert int(jnp.ones((2,), jnp.int32).sum()) == 2
            return {"cases": [c.name for c in self.cases], "unavailable": self.unavailable}
        index = request.get("case")
        indices = range(len(self.cases)) if index is None else [index]
        cases = [self.cases[i] for i in indices]
        for i in indices:
            stage(f"reference of {self.cases[i].name}")
            self._reference(i)
        program = _looped if index is None else _once
        what = f"a loop of {len(cases)}" if index is None else cases[0].name
        stage(f"compiling {what}")
        options = gpu_options(request["buffers"]) if jax.default_backend() == "gpu" else None
        arguments = tuple(case.arguments for case in cases)
        run = jax.jit(functools.partial(program, tuple(case.kernel for case in cases)))
        compiled = run.lower(arguments, jnp.int32(_TURNS)).compile(compiler_options=options)
        for turn in ("", " again"):
            stage(f"running {what}{turn}")
            results = jax.block_until_ready(compiled(arguments, jnp.int32(_TURNS)))
            for i, case, result in zip(indices, cases, results, strict=True):
                reason = differs(result, self._reference(i), case.tolerance)
                if reason is not None:
                    return {"reason": f"{case.name}: {reason}{turn}"}
        return {"reason": None}

    def _reference(self, index: int) -> list[np.ndarray]:
        if index not in self._wanted:
            case = self.cases[index]
            self._wanted[index] = _exact(jax.jit(case.reference)(*case.arguments))
        return self._wanted[index]


def _once(kernels: tuple[Callable, ...], arguments: tuple, turns) -> list:
    del turns
    return [kernel(*given) for kernel, given in zip(kernels, arguments, strict=True)]


def _looped(kernels: tuple[Callable, ...], arguments: tuple, turns) -> list:
    """The same `turns` times in a loop, of which the compiler cannot move anything out."""

    def body(carry):
        turn, _ = carry
        turn, given = lax.optimization_barrier((turn, arguments))
        return turn + 1, _once(kernels, given, turn)

    shapes = jax.eval_shape(lambda given: _once(kernels, given, turns), arguments)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return lax.while_loop(lambda carry: carry[0] < turns, body, (jnp.int32(0), zeros))[1]


def _exact(results: Any) -> list[np.ndarray]:
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(results)]


def differs(results: Any, wanted: list[np.ndarray], tolerance: float) -> str | None:
    """What is wrong with results, or None."""
    for got, right in zip(_exact(results), wanted, strict=True):
        if got.shape != right.shape:
            return f"the result has the shape {got.shape}, not {right.shape}"
        if not np.isfinite(got).all():
            return f"{int((~np.isfinite(got)).sum())} of {got.size} numbers are not finite"
        scale = np.sqrt(np.mean(right**2))
        error = np.sqrt(np.mean((got - right) ** 2)) / (scale or 1.0)
        if error > tolerance:
            return f"wrong numbers: relative error {error:.1e}, {tolerance:.0e} is allowed"
    return None
