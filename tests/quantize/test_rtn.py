"""Round to nearest on the grid of every scheme."""

import jax.numpy as jnp
import numpy as np
import pytest

from specjax.errors import ConfigError
from specjax.quant import scheme
from specjax.quantize import grid, rtn

# Scheme, group size, largest error in steps of the grid (half a step; more where scales are
# rounded).
CASES = [
    ("w8a16", -1, 0.51),
    ("w8a8", -1, 0.51),
    ("w4a16", -1, 0.51),
    ("w4a16", 32, 0.51),
    ("w4a16", 64, 0.51),
    ("w4a16", 128, 0.51),
    ("w4a16-asym", -1, 0.51),
    ("w4a16-asym", 32, 0.51),
    ("w4a8-qqq", -1, 0.51),
    ("w4a8-qqq", 128, 0.6),
    ("w4a8-qoq", -1, 0.51),
    ("w4a8-qoq", 128, 0.6),
    ("w4a4", -1, 0.51),
    ("w4a4", 64, 0.51),
]


def weights(rows=24, columns=256, seed=0):
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((rows, columns)) * generator.uniform(0.005, 0.05, (rows, 1))
    return jnp.asarray(values, jnp.float32)


def groups(array, size):
    return np.asarray(array).reshape(len(array), -1, size)


@pytest.mark.parametrize(("name", "group_size", "bound"), CASES)
def test_error_is_at_most_half_a_step(name, group_size, bound):
    weight = weights()
    linear = rtn.quantize(weight, scheme.lookup(name), group_size)
    size = linear.group_size
    step = np.asarray(linear.scales, np.float32)
    if linear.channel_scales is not None:
        step = step * np.asarray(linear.channel_scales, np.float32)[:, None]
    error = np.abs(groups(linear.dequantize() - weight, size)) / step[..., None]
    assert error.max() <= bound
    assert linear.codes.dtype == scheme.lookup(name).weights.code_dtype
    assert linear.scheme.name == name


@pytest.mark.parametrize(("name", "bound"), [("fp8", 2**-4), ("fp4", 2**-2)])
def test_float_codes_have_a_relative_error(name, bound):
    weight = weights()
    linear = rtn.quantize(weight, scheme.lookup(name), 32 if name == "fp4" else -1)
    smallest = np.asarray(linear.scales, np.float32)[..., None] * (0.5 if name == "fp4" else 2**-9)
    off = np.abs(groups(linear.dequantize() - weight, linear.group_size))
    allowed = np.maximum(bound * np.abs(groups(weight, linear.group_size)), smallest)
    assert np.all(off <= 1.001 * allowed)


@pytest.mark.parametrize("name", ["w4a16", "w4a16-asym", "w4a8-qqq", "w4a8-qoq", "fp4"])
def test_clip_search_lowers_the_error_it_minimizes(name):
    weight = weights().at[:, 7].mul(6.0)
    spec = scheme.lookup(name)

    def error(clip):
        off = jnp.abs(rtn.quantize(weight, spec, 64, clip=clip).dequantize() - weight)
        return float(jnp.sum(off**2.4))

    assert error(grid.ClipSearch()) < 0.95 * error(None)


@pytest.mark.parametrize(
    "name", ["w8a8", "w4a16", "w4a16-asym", "w4a8-qqq", "w4a8-qoq", "fp8", "fp4"]
)
@pytest.mark.parametrize("group_size", [-1, 32])
def test_zeros_and_constants_are_exact_or_close(name, group_size):
    weight = weights(4, 64).at[0].set(0.0).at[1].set(0.02)
    linear = rtn.quantize(weight, scheme.lookup(name), group_size, clip=grid.ClipSearch())
    dense = np.asarray(linear.checked("x").dequantize())
    assert np.all(dense[0] == 0)
    np.testing.assert_allclose(dense[1], 0.02, rtol=0.08)


def test_bias_is_kept_and_codes_are_deterministic():
    weight, bias = weights(), jnp.arange(24, dtype=jnp.float32)
    first = rtn.quantize(weight, scheme.lookup("w4a16"), 64, bias=bias)
    second = rtn.quantize(weight, scheme.lookup("w4a16"), 64, bias=bias)
    np.testing.assert_array_equal(first.codes, second.codes)
    np.testing.assert_array_equal(first.bias, bias)


def test_a_group_size_that_does_not_divide_is_refused_with_those_that_do():
    with pytest.raises(ConfigError, match=r"down_proj: group_size=96 .* in_features=256.*64, 128"):
        rtn.quantize(weights(), scheme.lookup("w4a16"), 96, name="down_proj")
