"""The backends of the product with a weight in a format, as `api.py` lists them.

Mosaic and Triton take packed weights only: packing on every call would read the weight many times.
XLA takes both; packed weights are unpacked on every call, which is slow and said once by `dispatch`.
"""

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp

from specjax.pallas import device, dispatch
from specjax.pallas.matmul import packed, reference
from specjax.pallas.matmul.form import PackedWeight
from specjax.pallas.matmul.formats import registry
from specjax.pallas.matmul.formats.base import Format

# More rows than this are a prompt: the weight is decoded once and multiplied by XLA's matmul.
MAX_ROWS = 256
_FLOATS = (jnp.float16, jnp.bfloat16)


def format_of(weight) -> Format:
    """Of a packed or canonical weight."""
    return weight.form.format if isinstance(weight, PackedWeight) else registry.of(weight)


@functools.cache
def implementations(format: Format, input_bits: int) -> tuple[dispatch.Implementation, ...]:
    """Of the product with inputs of so many bits (16: floats), fastest first."""
    return tuple(_IMPLEMENTATIONS[backend] for backend in format.backends(input_bits))


def has_kernel(format: Format, input_bits: int, backend: dispatch.Backend) -> bool:
    """Whether a kernel that may run on this machine multiplies packed weights of a format by such inputs."""
    here = {"mosaic": lambda: device.unsupported() is None, "triton": _has_triton}
    return any(
        name in here and here[name]() and dispatch.permits(backend, format.op(input_bits), name)
        for name in format.backends(input_bits)
    )


def _has_triton() -> bool:
    from specjax.pallas.matmul import triton

    return triton.unavailable() is None


# Kernels are imported when one runs: the compilers of Pallas and Triton are of no use before.
def _run_mosaic(rows, weight, **kwargs):
    from specjax.pallas.matmul import mosaic

    return mosaic.matmul(rows, weight, arch=device.current().arch, **kwargs)


def _run_triton(rows, weight, *, bias, **kwargs):
    del kwargs  # of quantized inputs
    from specjax.pallas.matmul import triton

    return triton.matmul(rows, weight, bias=bias, arch=triton.arch())


def _refuses_mosaic(x, weight, *, x_scale=None, **kwargs) -> str | None:
    del kwargs
    reason = device.unsupported()
    if reason is not None:
        return reason
    if not isinstance(weight, PackedWeight):
        return packed.refuses_unpacked(weight)
    form = weight.form
    if x_scale is not None:
        return "group_size=32 under integer inputs" if form.table_group == 32 else None
    if x.dtype not in _FLOATS:
        return f"inputs are {x.dtype}; the kernels take float16 and bfloat16"
    return packed.refuses_floats(form.format)


def _refuses_triton(x, weight, **kwargs) -> str | None:
    del kwargs
    from specjax.pallas.matmul import triton

    return triton.refuses(x, weight)


def _by_rows(launch: Callable) -> Callable:
    """A launch over the rows of the inputs, all leading axes flattened; of prompts the decoded weight."""

    def run(x, weight, *, x_scale=None, x_sums=None, **kwargs):
        leading = x.shape[:-1]
        if math.prod(leading) > MAX_ROWS:
            kwargs.pop("tuned", None)
            return _run_xla(x, weight, x_scale=x_scale, x_sums=x_sums, **kwargs)
        x, x_scale, x_sums = (
            None if a is None else a.reshape(-1, a.shape[-1]) for a in (x, x_scale, x_sums)
        )
        out = launch(x, weight, x_scale=x_scale, x_sums=x_sums, **kwargs)
        return out.reshape(*leading, -1)

    return run


def _run_xla(x, weight, **kwargs):
    if isinstance(weight, PackedWeight):
        weight = packed.unpack(weight)
    return reference.matmul(x, weight, **kwargs)


_IMPLEMENTATIONS = {
    "mosaic": dispatch.Implementation(
        backend="mosaic", run=_by_rows(_run_mosaic), refuses=_refuses_mosaic, tunable=True
    ),
    "triton": dispatch.Implementation(
        backend="triton", run=_by_rows(_run_triton), refuses=_refuses_triton
    ),
    "xla": dispatch.Implementation(backend="xla", run=_run_xla),
}
