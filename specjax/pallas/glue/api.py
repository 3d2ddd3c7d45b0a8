"""The ops of this folder: one launch on a GPU that the kernels support, plain jnp elsewhere."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specjax.pallas import device, dispatch
from specjax.pallas.glue.parts import Parts, value

OP = "glue"
# Beyond this many rows XLA's own kernels have enough to do.
_MAX_ROWS = 256


def _kernels_run(backend: dispatch.Backend, *arrays) -> bool:
    """Whether this machine and these dtypes are for the kernels."""
    if device.unsupported() is not None:
        return False
    if not all(array.dtype in (jnp.bfloat16, jnp.float16) for array in arrays):
        return False
    return dispatch.permits(backend, OP, "mosaic")


def residual_norm(
    x: Float[Array, "B T D"], added: Parts | Array | None, norm, backend: dispatch.Backend = "auto"
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """(x + added, norm of that); `added` None is zero.

    Args:
        norm: a norm as those of `models.layers`; the kernel knows `RMSNorm` whose weight is its gain.
    """
    size = x.shape[-1]
    fits = isinstance(added, Parts) and size % 1024 == 0 and added.num_rows <= _MAX_ROWS
    gain = norm.weight[...]
    if not fits or not norm.is_plain or gain.dtype != x.dtype or not _kernels_run(backend, x):
        total = x if added is None else x + value(added)
        return total, norm(total)
    from specjax.pallas.glue import kernels

    rows = x.reshape(-1, size)
    total, normed = kernels.residual_norm(added.sums, rows, gain, eps=norm.eps)
    return total.reshape(x.shape), normed.reshape(x.shape)


def can_rotate_and_write(projected, keys: Float[Array, "B K S C"], backend) -> bool:
    """Whether `kernels.rotate_and_write` takes these projections and caches here."""
    fits = isinstance(projected, Parts) and projected.num_rows <= _MAX_ROWS
    return fits and keys.shape[-1] == 128 and _kernels_run(backend, keys)


def move_rows(
    buffers: list[Float[Array, "B K S C"]],
    start: Int[Array, "B"],
    path: Int[Array, "B P"],
    backend: dispatch.Backend = "auto",
) -> list[Float[Array, "B K S C"]] | None:
    """Slot start + path[j] -> slot start + j in every buffer, in one launch; None where no kernel can."""
    fits = buffers[0].shape[-1] == 128 and len(buffers) <= _MAX_ROWS
    if not fits or not _kernels_run(backend, *buffers):
        return None
    from specjax.pallas.glue import kernels

    return kernels.move_rows(buffers, start, path)
