"""Progressive quantization: the integers of both levels stay where QServe's kernels need them."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from specjax.quant import scheme
from specjax.quantize import gptq, grid, qoq, rtn

QOQ = scheme.lookup("w4a8-qoq")


@settings(deadline=None, max_examples=60)
@given(
    low=st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4),
    spread=st.lists(st.floats(0, 5, width=32), min_size=4, max_size=4),
)
def test_every_code_of_every_range_fits_int8(low, spread):
    low = jnp.asarray([low], jnp.float32)
    high = low + jnp.asarray([spread], jnp.float32)
    unit = jnp.maximum(jnp.max(jnp.abs(jnp.stack([low, high]))), 1e-3)[None] / 119
    scales, zeros = qoq.second_level(low, high, unit)
    scales, zeros = np.asarray(scales), np.asarray(zeros)
    assert np.all((scales == np.round(scales)) & (scales >= 1) & (scales <= 16))
    assert np.all(zeros >= -128) and np.all(zeros + 15 * scales <= 127)
    # The range is covered to half a step on either side.
    for end in (low, high):
        w8 = np.clip(np.round(np.asarray(end / unit)), -119, 119)
        assert np.all(w8 >= zeros - scales / 2) and np.all(w8 <= zeros + 15.5 * scales)


def weights():
    generator = np.random.default_rng(1)
    values = generator.standard_normal((32, 512)) * generator.uniform(0.2, 3, (32, 1))
    return jnp.asarray(values, jnp.float32).at[3, 17].set(20.0)


def test_first_level_keeps_the_protective_range():
    weight = weights()
    linear = rtn.quantize(weight, QOQ, 128, clip=grid.ClipSearch())
    w8 = np.asarray(weight) / np.asarray(linear.channel_scales, np.float32)[:, None]
    assert np.abs(w8).max() <= qoq.PROTECTIVE_RANGE * 1.001
    assert linear.scales.dtype == jnp.int8 and linear.zeros.dtype == jnp.int8
    assert linear.channel_scales.dtype == jnp.float16


def test_gptq_stays_in_range_when_it_moves_weights_beyond_their_original_range():
    generator = np.random.default_rng(2)
    x = generator.standard_normal((256, 8)) @ generator.standard_normal((8, 512))
    factor = gptq.factorize((x.T @ x).astype(np.float32))
    linear = gptq.quantize(weights(), factor, QOQ, 128)
    codes = np.asarray(linear.codes.astype(jnp.int32)).reshape(32, -1, 128)
    w8 = codes * np.asarray(linear.scales, np.int32)[..., None]
    w8 = w8 + np.asarray(linear.zeros, np.int32)[..., None]
    assert w8.min() >= -128 and w8.max() <= 127


def test_per_channel_has_minima_in_half_precision():
    weight = weights() + 0.5
    linear = rtn.quantize(weight, QOQ, -1)
    assert linear.minima.dtype == jnp.float16 and linear.channel_scales is None
    low = np.asarray(linear.minima, np.float32)[:, 0]
    np.testing.assert_allclose(low, np.asarray(weight).min(1), rtol=0.02, atol=1e-3)
