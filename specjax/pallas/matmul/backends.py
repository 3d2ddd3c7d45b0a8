"""The backends of a matmul op over packed or canonical weights, as its `api.py` lists them.

Mosaic takes packed weights only: packing on every call would read the weight many times. XLA takes
both; packed weights are unpacked on every call, which is slow and said once by `dispatch`.
"""

import importlib
import math
from collections.abc import Callable

import jax.numpy as jnp

from specjax.pallas import device, dispatch
from specjax.pallas.matmul import packed

# More rows than this are a prompt: the weight is decoded once and multiplied by XLA's matmul.
MAX_ROWS = 256
ARCHS = ((9, 0), (8, 0), (8, 6), (8, 7), (8, 9))
_FLOATS = (jnp.float16, jnp.bfloat16)


def of_floats(
    op: str, code_bits: int, reference: Callable, *, triton: bool = False
) -> tuple[dispatch.Implementation, ...]:
    """Backends of an op (x, weight, *, bias) with float inputs, fastest first; with `triton` that too."""

    def refuses(x, weight, *, bias=None) -> str | None:
        del bias
        reason = _refuses(weight, code_bits)
        if reason is None and x.dtype not in _FLOATS:
            reason = f"inputs are {x.dtype}; the kernels take float16 and bfloat16"
        return reason

    def by(launch: Callable):
        def run(x, weight, *, bias=None):
            if math.prod(x.shape[:-1]) > MAX_ROWS:
                return reference(x, packed.unpack(weight), bias=bias)
            rows = x.reshape(-1, x.shape[-1])
            return launch(rows, weight, bias=bias).reshape(*x.shape[:-1], -1)

        return run

    def mosaic(rows, weight, bias):
        return _module(op, "mosaic").matmul(rows, weight, bias=bias, arch=device.current().arch)

    found = _backends(by(mosaic), refuses, reference)
    return (found[0], _triton(op, by), *found[1:]) if triton else found


def _triton(op: str, by: Callable) -> dispatch.Implementation:
    def launch(rows, weight, bias):
        module = _module(op, "triton")
        return module.matmul(rows, weight, bias=bias, arch=module.arch())

    def refuses(*args, **kwargs) -> str | None:
        return _module(op, "triton").refuses(*args, **kwargs)

    return dispatch.Implementation(backend="triton", run=by(launch), refuses=refuses)


def of_integers(
    op: str, code_bits: int, reference: Callable
) -> tuple[dispatch.Implementation, ...]:
    """Backends of an op (x_codes, x_scale, weight, *, x_sums, bias, out_dtype), fastest first."""

    def refuses(x_codes, x_scale, weight, **kwargs) -> str | None:
        del x_codes, x_scale, kwargs
        reason = _refuses(weight, code_bits)
        if reason is None and weight.form.table_group == 32:
            reason = "group_size=32 under integer inputs"
        return reason

    def run(x_codes, x_scale, weight, *, x_sums=None, **kwargs):
        leading = x_codes.shape[:-1]
        if math.prod(leading) > MAX_ROWS:
            return reference(x_codes, x_scale, packed.unpack(weight), x_sums=x_sums, **kwargs)
        rows = [
            None if a is None else a.reshape(-1, a.shape[-1]) for a in (x_codes, x_scale, x_sums)
        ]
        matmul = _module(op, "mosaic").matmul
        out = matmul(*rows[:2], weight, x_sums=rows[2], arch=device.current().arch, **kwargs)
        return out.reshape(*leading, -1)

    return _backends(run, refuses, reference)


def _backends(run: Callable, refuses: Callable, reference: Callable):
    return (
        dispatch.Implementation(backend="mosaic", run=run, refuses=refuses),
        dispatch.Implementation(backend="xla", run=_unpacking(reference)),
    )


def _refuses(weight, code_bits: int) -> str | None:
    reason = device.unsupported(ARCHS)
    if reason is not None:
        return reason
    if not isinstance(weight, packed.PackedWeight):
        return packed.refuses_codes(weight) or "the weight is not packed (prepare does it at load)"
    if weight.form.code_bits != code_bits:
        return f"codes have {weight.form.code_bits} bits, the op {code_bits}"
    return None


def _module(op: str, backend: str):
    # Imported when a kernel runs: the compilers of Pallas and Triton are of no use before.
    return importlib.import_module(f"specjax.pallas.{op}.{backend}")


def _unpacking(reference: Callable) -> Callable:
    def run(*args, **kwargs):
        args = [packed.unpack(a) if isinstance(a, packed.PackedWeight) else a for a in args]
        return reference(*args, **kwargs)

    return run
