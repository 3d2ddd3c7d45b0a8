"""Key/value cache: static capacity, per-sequence lengths kept by the caller.

Nothing here knows what is committed: slots at or beyond a sequence's length hold junk that no mask ever shows, so
rolling back is lowering a number and committing a tree path is moving its rows into place.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from specjax.config import ModelConfig
from specjax.pallas import dispatch
from specjax.pallas.glue import api as glue

# Up to this batch size rows are written one after the other (each in place); above it one scatter writes them all.
_UNROLLED_BATCH = 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DepthRecord:
    """What a model with routed layers (`specjax.depth.routed`) keeps beside its keys and values.

    Attributes:
        valid: one array per routed layer: which slots hold a token that ran through it. As with keys and values, what
            stands at or beyond a sequence's length is junk that no mask shows.
        runs: by layer of the model, in how many passes over draft trees it ran.
    """

    valid: tuple[Bool[Array, "B S"], ...]
    runs: Int[Array, "B L"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of one model.

    Attributes:
        keys: one array per layer, [B, K, S, C], rotary embedding applied.
        values: one array per layer, [B, K, S, C].
        depth: of models with routed layers only.
    """

    keys: tuple[Float[Array, "B K S C"], ...]
    values: tuple[Float[Array, "B K S C"], ...]
    depth: DepthRecord | None = None

    @property
    def capacity(self) -> int:
        """Slots per sequence."""
        return self.keys[0].shape[2]


def init(config: ModelConfig, batch: int, capacity: int, dtype, num_layers=None) -> KVCache:
    """An empty cache of `capacity` slots for `batch` sequences.

    `num_layers` defaults to the model's; where it is given, none of them is routed.
    """
    shape = (batch, config.num_kv_heads, capacity, config.head_dim)
    count = config.num_layers if num_layers is None else num_layers

    def empty():
        return tuple(jnp.zeros(shape, dtype) for _ in range(count))

    depth = None
    if config.depth is not None and num_layers is None:
        routed = range(config.depth.start_layer, count)
        depth = DepthRecord(
            valid=tuple(jnp.zeros((batch, capacity), bool) for _ in routed),
            runs=jnp.zeros((batch, count), jnp.int32),
        )
    return KVCache(keys=empty(), values=empty(), depth=depth)


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


def write_flags(
    buffer: Bool[Array, "B S"], rows: Bool[Array, "B T"], start: Int[Array, "B"]
) -> Bool[Array, "B S"]:
    """Like `write_rows` for one flag per slot."""
    offset = jnp.arange(buffer.shape[1]) - start[:, None]
    inside = (offset >= 0) & (offset < rows.shape[1])
    placed = jnp.take_along_axis(rows, jnp.clip(offset, 0, rows.shape[1] - 1), axis=1)
    return jnp.where(inside, placed, buffer)


def compact(
    cache: KVCache,
    start: Int[Array, "B"],
    path: Int[Array, "B P"],
    backend: dispatch.Backend = "auto",
) -> KVCache:
    """Moves the accepted path into place: slot start + path[j] -> slot start + j, in every layer.

    The rows are gathered before any is written (source and destination overlap). Entries of `path` beyond the accepted
    length may be any node: what they move lies beyond the new length. `backend` is that of the cache's model.
    """
    depth = cache.depth
    if depth is not None:
        depth = replace(depth, valid=tuple(_move_flags(x, start, path) for x in depth.valid))
    moved = glue.move_rows([*cache.keys, *cache.values], start, path, backend)
    if moved is not None:
        count = len(cache.keys)
        return KVCache(keys=tuple(moved[:count]), values=tuple(moved[count:]), depth=depth)
    slots = (start[:, None] + path)[:, None, :, None]

    def move(buffer):
        return write_rows(buffer, jnp.take_along_axis(buffer, slots, axis=2), start)

    return KVCache(
        keys=tuple(move(x) for x in cache.keys),
        values=tuple(move(x) for x in cache.values),
        depth=depth,
    )


def _move_flags(buffer, start, path):
    rows = jnp.take_along_axis(buffer, start[:, None] + path, axis=1)
    return write_flags(buffer, rows, start)
