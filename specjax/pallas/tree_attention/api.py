"""Tree attention: the public op. One node over the cache (decoding), a chain and a prompt chunk are the same op."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax.pallas import device, dispatch
from specjax.pallas.glue.parts import Parts
from specjax.pallas.tree_attention import reference


# Pallas is imported where there is a GPU for it only: it takes a third of the import time of this package.
def _mosaic(*args, valid, window, scale, softcap, **kwargs):
    from specjax.pallas.tree_attention import mosaic

    return mosaic.tree_attention(*args, **kwargs)


def _mosaic_refuses(*args, valid, window, scale, softcap, **kwargs) -> str | None:
    if valid is not None:
        return "tokens skip layers (routed depth), and the kernel has no mask of valid slots"
    for name, value in (("window", window), ("scale", scale), ("softcap", softcap)):
        if value is not None:
            return f"{name}={value:g}: the kernel has no {name}"
    reason = device.unsupported()
    if reason is not None:
        return reason
    from specjax.pallas.tree_attention import mosaic

    return mosaic.refuses(*args, **kwargs)


OP = "tree_attention"
IMPLEMENTATIONS = (
    dispatch.Implementation(backend="mosaic", run=_mosaic, refuses=_mosaic_refuses),
    dispatch.Implementation(backend="xla", run=reference.tree_attention),
)


def tree_attention(
    q: Float[Array, "B T H C"],
    keys: Float[Array, "B K S C"],
    values: Float[Array, "B K S C"],
    *,
    start: Int[Array, "B"],
    prefix: Int[Array, "B"],
    tail: Bool[Array, "B T W"] | None,
    valid: Bool[Array, "B S"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: dispatch.Backend = "auto",
) -> Float[Array, "B T H C"]:
    """See `reference.tree_attention`, which defines the op.

    Raises:
        SpecjaxError: `backend` is unknown, not implemented for this op, or refuses these arguments.
    """
    return dispatch.run(
        *(OP, backend, IMPLEMENTATIONS, q, keys, values),
        start=start,
        prefix=prefix,
        tail=tail,
        valid=valid,
        window=window,
        scale=scale,
        softcap=softcap,
    )


def kernel_takes(
    projected: Parts,
    keys: Float[Array, "B K S C"],
    tail: Bool[Array, "B T W"] | None,
    backend: dispatch.Backend = "auto",
) -> bool:
    """Whether `project_and_attend` can run here: as for `tree_attention`, with queries like the cache."""
    if device.unsupported() is not None:
        return False
    from specjax.pallas.tree_attention import mosaic

    fits = mosaic.refuses_cache(keys, tail) is None and projected.dtype == keys.dtype
    return fits and dispatch.permits(backend, OP, "mosaic")


def project_and_attend(
    projected: Parts,
    rope: tuple[Float[Array, "B T 1 C"], Float[Array, "B T 1 C"]],
    keys: Float[Array, "B K S C"],
    values: Float[Array, "B K S C"],
    *,
    start: Int[Array, "B"],
    prefix: Int[Array, "B"],
    tail: Bool[Array, "B T W"] | None,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B K S C"], Float[Array, "B K S C"]]:
    """Rotary embedding, rows of the cache and attention, from the fused projection; on GPUs only.

    Returns:
        attention, keys and values.
    """
    from specjax.pallas.glue import kernels
    from specjax.pallas.tree_attention import mosaic

    batch, nodes, width = projected.shape
    kv_heads, _, channels = keys.shape[1:]
    heads = width // channels - 2 * kv_heads
    layout = mosaic.plan((batch, nodes, heads, channels), keys, tail)
    cos, sin = (table[:, :, 0] for table in rope)
    first, second = jnp.split(sin, 2, axis=-1)
    queries, keys, values = kernels.rotate_and_write(
        *(projected.sums, cos, jnp.concatenate([-first, second], axis=-1)),
        *(keys, values, start),
        heads=heads,
        num_rows=layout.num_rows,
    )
    out = mosaic.attend(layout, queries, keys, values, start=start, prefix=prefix, tail=tail)
    return out, keys, values
