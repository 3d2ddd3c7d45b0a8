"""Tree attention on NVIDIA GPUs: the query heads of a kv head and the nodes are the rows of one matrix product.

Thread block (sequence, kv head, rows, split) goes over every splits-th block of the cache with a running softmax; the
splits are combined in a fixed order. Slots that all rows see are not masked at all; only the last blocks look at the
ancestor bits. Here is the frame; the kernels are `mosaic_sm90` (TMA, wgmma) and `mosaic_sm80` (cp.async, mma.sync).
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from specjax.pallas import device
from specjax.pallas.glue import kernels as glue
from specjax.pallas.tree_attention import config as configs
from specjax.pallas.tree_attention.config import ROWS, WORD, Config

NEVER = -1e30  # score of an invisible slot; finite, so that rows that see nothing stay finite


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Static description of one launch.

    Attributes:
        nodes: T, tokens of the block.
        group: query heads per kv head; row r is node r // group.
        width: W, slots of the masked tail; None: causal.
        config: tiles.
        interpret: parameters of the CPU interpreter, or None.
    """

    nodes: int
    group: int
    width: int | None
    config: Config
    interpret: Any = None

    @property
    def tile(self) -> int:
        """Rows of a thread block."""
        return ROWS * self.config.warpgroups

    @property
    def num_rows(self) -> int:
        """Rows of the packed queries: whole tiles."""
        return configs.row_tiles(self.nodes * self.group, self.config) * self.tile

    @property
    def num_words(self) -> int:
        """Words of the mask operand per row: ancestor bits, or the last visible slot."""
        return 1 if self.width is None else -(-self.width // WORD)

    @property
    def kept_rows(self) -> int:
        """Rows of a warpgroup that are written: all, but where one warpgroup has rows to spare."""
        rows = self.nodes * self.group
        return ROWS if rows > ROWS else -(-rows // 8) * 8


def refuses(q, keys, values, *, start, prefix, tail) -> str | None:
    """Why the kernels cannot take these arguments, or None."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or keys.dtype != q.dtype:
        return f"{q.dtype} queries over a {keys.dtype} cache; both must be bfloat16 or both float16"
    return refuses_cache(keys, tail)


def refuses_cache(keys, tail) -> str | None:
    """Why the kernels cannot read this cache or mask, or None."""
    if keys.shape[-1] not in (64, 128):
        return f"head_dim {keys.shape[-1]}; 64 and 128 are supported"
    if keys.shape[2] % 16:
        return f"a cache of {keys.shape[2]} slots; a multiple of 16 is needed"
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
    from specjax.pallas.tree_attention import mosaic_sm80, mosaic_sm90  # they import this module

    kernel = mosaic_sm90.kernel if arch >= (9, 0) else mosaic_sm80.kernel
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


def block_range(layout: Layout, bounds, split, tile):
    """This split's number of blocks, how many of them need no mask, and the tile's first masked slot.

    Args:
        bounds: (prefix, start) of the sequence, as scalars.
        tile: index of the row tile.
    """
    config = layout.config
    prefix, start = bounds
    if layout.width is None:
        first = lax.div(tile * layout.tile, jnp.int32(layout.group))
        last = lax.div(tile * layout.tile + layout.tile - 1, jnp.int32(layout.group))
        full = start + first + 1
        total = start + jnp.minimum(last + 1, layout.nodes)
    else:
        full, total = prefix, prefix + layout.width

    def share(blocks):
        return jnp.maximum(lax.div(blocks - split + config.splits - 1, jnp.int32(config.splits)), 0)

    num_blocks = lax.div(total + config.block - 1, jnp.int32(config.block))
    return share(num_blocks), share(lax.div(full, jnp.int32(config.block)))


def visible(layout: Layout, column, words, prefix):
    """Which of the slots `column` each row sees.

    Args:
        words: per mask word its value in the shape of `column`.
    """
    if layout.width is None:
        return column <= words[0]
    offset = column - prefix
    word = words[0]
    for index in range(1, layout.num_words):
        word = jnp.where(lax.shift_right_arithmetic(offset, 5) == index, words[index], word)
    bit = lax.shift_right_logical(word, offset & (WORD - 1)) & 1
    return (offset < 0) | ((bit == 1) & (offset < WORD * layout.num_words))


def online_softmax(scores, top, total):
    """One block of the running softmax: weights, the factor of what was summed before, new maximum and sum.

    `scores` are exponents of two. They must be scaled before they are masked: where all of a row is invisible, a
    contraction of NEVER * scale - NEVER * scale into one instruction leaves a rounding error of 1e22.
    """
    new_top = jnp.maximum(top, scores.max(axis=1))
    decay = jnp.exp2(top - new_top)
    weights = jnp.exp2(scores - lax.broadcast_in_dim(new_top, scores.shape, (0,)))
    return weights, decay, new_top, total * decay + weights.sum(axis=1)


def score_scale(channels: int) -> float:
    """Factor that turns products into exponents of two."""
    return channels**-0.5 * math.log2(math.e)


def out_types(layout: Layout, q, kept_rows: int):
    """Unnormalized sums, maxima and sums of weights by split."""
    batch, kv_heads, rows, channels = q.shape
    kept = rows if rows > ROWS else kept_rows
    lead = (layout.config.splits, batch, kv_heads)
    return [
        jax.ShapeDtypeStruct((*lead, kept, channels), jnp.float32),
        jax.ShapeDtypeStruct((*lead, rows), jnp.float32),
        jax.ShapeDtypeStruct((*lead, rows), jnp.float32),
    ]


def grid(layout: Layout, q):
    """Sizes and names of the launch grid."""
    batch, kv_heads, rows, _ = q.shape
    sizes = (batch * kv_heads, rows // layout.tile, layout.config.splits)
    return dict(grid=sizes, grid_names=("head", "tile", "split"))
