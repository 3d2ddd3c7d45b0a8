"""Tree attention on NVIDIA GPUs: the query heads of a kv head and the nodes are the rows of one matrix product.

Thread block (sequence, kv head, rows, split) goes over every splits-th block of the cache with a running softmax; the
splits are combined in a fixed order. Slots that all rows see are not masked at all; only the last blocks look at the
ancestor bits. Here is what surrounds the kernels: `mosaic_sm90` (TMA, wgmma) and `mosaic_sm80` (cp.async, mma.sync),
which share `frame.py`.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from specjax.pallas import device
from specjax.pallas.glue import kernels as glue
from specjax.pallas.tree_attention import config as configs
from specjax.pallas.tree_attention import mosaic_sm80, mosaic_sm90
from specjax.pallas.tree_attention.config import WORD, Config
from specjax.pallas.tree_attention.frame import Layout


def refuses(q, keys, values, *, start, prefix, tail) -> str | None:
    """Why the kernels cannot take these arguments, or None."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or keys.dtype != q.dtype:
        return f"{q.dtype} queries over a {keys.dtype} cache; both must be bfloat16 or both float16"
    return refuses_cache(keys, tail)


def refuses_cache(keys, tail) -> str | None:
    """Why the kernels cannot read this cache or mask, or None."""
    if keys.shape[-1] not in (64, 128):
        return f"head_dim {keys.shape[-1]}; 64 and 128 are supported"
    gpu = device.current()
    # wgmma takes the weights of no fewer slots from registers.
    unit = 64 if gpu is not None and gpu.arch >= (9, 0) else 16
    if keys.shape[2] % unit:
        return f"a cache of {keys.shape[2]} slots; a multiple of {unit} is needed"
    if tail is not None and tail.shape[-1] > WORD * configs.MAX_WORDS:
        return f"a tail of {tail.shape[-1]} slots; {WORD * configs.MAX_WORDS} are supported"
    return None


def tree_attention(
    q: Float[Array, "B T H C"],
    keys: Float[Array, "B K S C"],
    values: Float[Array, "B K S C"],
    *,
    start: Int[Array, "B"],
    prefix: Int[Array, "B"],
    tail: Bool[Array, "B T W"] | None,
    arch: tuple[int, int] | None = None,
    config: Config | None = None,
    interpret: Any = None,
) -> Float[Array, "B T H C"]:
    """See `reference.tree_attention`; scores, softmax and sums in float32.

    Args:
        arch: compute capability, default: of `device.current()`.
        config: tiles; default: heuristic for `device.current()`.
        interpret: `plgpu.InterpretGPUParams` to run on CPUs.
    """
    batch, nodes, _, channels = q.shape
    kv_heads = keys.shape[1]
    layout = plan(q.shape, keys, tail, config=config, interpret=interpret)
    group, rows = layout.group, layout.num_rows
    packed = q.reshape(batch, nodes, kv_heads, group, channels).transpose(0, 2, 1, 3, 4)
    packed = packed.reshape(batch, kv_heads, nodes * group, channels)
    packed = jnp.pad(packed, ((0, 0), (0, 0), (0, rows - nodes * group), (0, 0)))
    return attend(layout, packed, keys, values, start=start, prefix=prefix, tail=tail, arch=arch)


def plan(
    shape: tuple[int, ...], keys, tail, *, config: Config | None = None, interpret=None
) -> Layout:
    """The launch for queries of a shape [B, T, H, C]; tiles by default for `device.current()`."""
    batch, nodes, heads, channels = shape
    kv_heads, capacity = keys.shape[1:3]
    group = heads // kv_heads
    config = config or configs.heuristic(
        batch=batch,
        kv_heads=kv_heads,
        rows=nodes * group,
        num_tokens=nodes,
        capacity=capacity,
        head_dim=channels,
        gpu=device.current(),
    )
    width = None if tail is None else tail.shape[-1]
    return Layout(nodes=nodes, group=group, width=width, config=config, interpret=interpret)


def attend(layout: Layout, packed, keys, values, *, start, prefix, tail, arch=None):
    """Attention of packed queries [B, K, layout.num_rows, C], row t * group + g; returns [B, T, H, C]."""
    batch, kv_heads, rows, channels = packed.shape
    arch = arch or device.current().arch
    nodes, group = layout.nodes, layout.group
    mask = _mask_operand(layout, rows, start, tail)
    bounds = jnp.stack([start if tail is None else prefix, start], axis=1).astype(jnp.int32)
    kernel = mosaic_sm90.kernel if arch[0] == 9 else mosaic_sm80.kernel
    out, top, total = kernel(layout, packed, keys, values, mask, bounds)
    if channels % 128 == 0:
        return glue.combine(
            *(out, top, total),
            nodes=nodes,
            group=group,
            dtype=packed.dtype,
            interpret=layout.interpret,
        )
    out = _combine(out, top[..., : out.shape[3]], total[..., : out.shape[3]])
    out = out[:, :, : nodes * group].reshape(batch, kv_heads, nodes, group, channels)
    out = out.transpose(0, 2, 1, 3, 4).reshape(batch, nodes, kv_heads * group, channels)
    return out.astype(packed.dtype)


def _mask_operand(layout: Layout, rows: int, start, tail):
    """[B, words, rows] int32: what each row sees beyond the slots that all see."""
    node = jnp.minimum(jnp.arange(rows, dtype=jnp.int32) // layout.group, layout.nodes - 1)
    if tail is None:
        return (start.astype(jnp.int32)[:, None] + node)[:, None]
    batch, nodes, width = tail.shape
    words = layout.num_words
    bits = jnp.pad(tail, ((0, 0), (0, 0), (0, words * WORD - width)))
    bits = bits.reshape(batch, nodes, words, WORD).astype(jnp.uint32)
    packed = jnp.sum(bits << jnp.arange(WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)
    packed = lax.bitcast_convert_type(packed, jnp.int32)
    return jnp.take(packed, node, axis=1).swapaxes(1, 2)


def _combine(out, top, total):
    """Weighs the splits' sums by their maxima, in the order of the splits.

    Written out by split, so that XLA makes one elementwise kernel of it.
    """
    best = functools.reduce(jnp.maximum, list(top))
    weights = [jnp.exp2(part - best) for part in top]
    norm = sum(weight * part for weight, part in zip(weights, total, strict=True))
    summed = sum(weight[..., None] * part for weight, part in zip(weights, out, strict=True))
    return summed / jnp.maximum(norm, 1e-30)[..., None]
