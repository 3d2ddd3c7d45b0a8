"""What the kernels of tree attention share: the description of a launch, visibility and the running softmax."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

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


def block_range(layout: Layout, bounds, split, tile, capacity: int):
    """This split's number of blocks, how many of them need no mask, and the tile's first masked slot.

    Args:
        bounds: (prefix, start) of the sequence, as scalars.
        tile: index of the row tile.
        capacity: slots of the cache; behind them lies the next head.
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
    full, total = (jnp.minimum(slots, jnp.int32(capacity)) for slots in (full, total))

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
