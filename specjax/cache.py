"""Key/value cache: static capacity, per-sequence lengths kept by the caller.

Nothing here knows what is committed: slots at or beyond a sequence's length hold junk that no mask ever shows, so
rolling back is lowering a number and committing a tree path is moving its rows into place.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from specjax.config import ModelConfig
from specjax.pallas.glue import api as glue

# Up to this batch size rows are written one after the other (each in place); above it one scatter writes them all.
_UNROLLED_BATCH = 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of one model.

    Attributes:
        keys: one array per layer, [B, K, S, C], rotary embedding applied.
        values: one array per layer, [B, K, S, C].
    """

    keys: tuple[Float[Array, "B K S C"], ...]
    values: tuple[Float[Array, "B K S C"], ...]

    @property
    def capacity(self) -> int:
        """Slots per sequence."""
        return self.keys[0].shape[2]


def init(config: ModelConfig, batch: int, capacity: int, dtype, num_layers=None) -> KVCache:
    """An empty cache of `capacity` slots for `batch` sequences; `num_layers` defaults to the model's."""
    shape = (batch, config.num_kv_heads, capacity, config.head_dim)
    count = config.num_layers if num_layers is None else num_layers

    def empty():
        return tuple(jnp.zeros(shape, dtype) for _ in range(count))

    return KVCache(keys=empty(), values=empty())


def write_rows(
    buffer: Float[Array, "B K S C"], rows: Float[Array, "B K T C"], start: Int[Array, "B"]
) -> Float[Array, "B K S C"]:
    """Puts T rows of every sequence at slots start[b] .. start[b] + T - 1 (the caller guarantees that they fit)."""
    batch, _, num_rows, _ = rows.shape
    if batch <= _UNROLLED_BATCH:
        for b in range(batch):
            buffer = lax.dynamic_update_slice(buffer, rows[b : b + 1], (b, 0, start[b], 0))
        # Without the barrier XLA fuses the update once into attention and once into the loop's carry, each with a copy
        # of the whole buffer (measured on CPU: 15 layers of cache in temporaries instead of 0.05).
        return lax.optimization_barrier(buffer)
    slots = start[:, None] + jnp.arange(num_rows)
    return buffer.at[jnp.arange(batch)[:, None], :, slots].set(rows.swapaxes(1, 2))


def compact(cache: KVCache, start: Int[Array, "B"], path: Int[Array, "B P"]) -> KVCache:
    """Moves the accepted path into place: slot start + path[j] -> slot start + j, in every layer.

    The rows are gathered before any is written (source and destination overlap). Entries of `path` beyond the accepted
    length may be any node: what they move lies beyond the new length.
    """
    moved = glue.move_rows([*cache.keys, *cache.values], start, path)
    if moved is not None:
        count = len(cache.keys)
        return KVCache(keys=tuple(moved[:count]), values=tuple(moved[count:]))
    slots = (start[:, None] + path)[:, None, :, None]

    def move(buffer):
        return write_rows(buffer, jnp.take_along_axis(buffer, slots, axis=2), start)

    return KVCache(
        keys=tuple(move(x) for x in cache.keys), values=tuple(move(x) for x in cache.values)
    )
