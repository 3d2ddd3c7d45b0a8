"""The KV cache: writing rows and moving an accepted path into place, against numpy."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from specjax.models import cache as kv
from tests import strategies, tiny
from tests.strategies import SETTINGS

HEADS, CAPACITY, CHANNELS = 2, 24, 4

write_rows = jax.jit(kv.write_rows, donate_argnums=0)
compact = jax.jit(kv.compact)


def written(buffer: np.ndarray, rows: np.ndarray, start) -> np.ndarray:
    """`write_rows` row by row."""
    result = buffer.copy()
    for b, first in enumerate(start):
        for t in range(rows.shape[2]):
            result[b, :, first + t] = rows[b, :, t]
    return result


def random(rng, *shape) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("batch", range(1, 10))
@pytest.mark.parametrize("num_rows", [1, 5])
def test_write_rows_is_numpy_in_both_code_paths(batch, num_rows):
    """Up to eight sequences are written one by one, more with a scatter."""
    rng = np.random.default_rng(batch)
    buffer = random(rng, batch, HEADS, CAPACITY, CHANNELS)
    rows = random(rng, batch, HEADS, num_rows, CHANNELS)
    start = rng.integers(0, CAPACITY - num_rows + 1, batch)
    start[0] = CAPACITY - num_rows
    start[-1] = 0
    found = write_rows(jnp.asarray(buffer), jnp.asarray(rows), jnp.asarray(start, jnp.int32))
    assert (np.asarray(found) == written(buffer, rows, start)).all()


@SETTINGS
@hypothesis.given(
    strategies.seeds(), st.sampled_from([1, 3, 9]), st.sampled_from([2, 5]), st.integers(0, 15)
)
def test_compact_moves_the_path_out_of_place(seed, batch, path_rows, first):
    """Every row comes from where it was before any was moved, although the ranges overlap."""
    rng = np.random.default_rng(seed)
    layers = [random(rng, batch, HEADS, CAPACITY, CHANNELS) for _ in range(4)]
    start = np.minimum(first + np.arange(batch), CAPACITY - 9)
    # Any node anywhere: not only rising paths, because entries beyond the length may be any node.
    path = rng.integers(0, 9, (batch, path_rows))
    path[:, 0] = 0
    cache = kv.KVCache(
        keys=tuple(map(jnp.asarray, layers[:2])), values=tuple(map(jnp.asarray, layers[2:]))
    )
    moved = compact(cache, jnp.asarray(start, jnp.int32), jnp.asarray(path, jnp.int32))
    for before, after in zip(layers, (*moved.keys, *moved.values), strict=True):
        slots = start[:, None] + path
        rows = np.stack([before[b][:, slots[b]] for b in range(batch)])
        assert (np.asarray(after) == written(before, rows, start)).all()


@pytest.mark.parametrize("num_layers", [None, 1])
def test_init_has_one_buffer_per_layer(num_layers):
    config = tiny.config()
    cache = kv.init(config, 3, CAPACITY, jnp.bfloat16, num_layers=num_layers)
    assert len(cache.keys) == len(cache.values) == (num_layers or config.num_layers)
    assert cache.capacity == CAPACITY
    for buffer in (*cache.keys, *cache.values):
        assert buffer.shape == (3, config.num_kv_heads, CAPACITY, config.head_dim)
        assert buffer.dtype == jnp.bfloat16
