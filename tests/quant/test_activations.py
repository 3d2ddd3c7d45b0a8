"""Rounding of activations: the formula code by code, ties, empty rows, broken rows, compilation."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from specjax.quant.activations import quantize
from specjax.quant.scheme import ActivationSpec
from tests.quant import random_linears as draw

SPECS = {
    "int8": ActivationSpec(bits=8),
    "int4": ActivationSpec(bits=4),
    "int8-full": ActivationSpec(bits=8, full_range=True),
    "e4m3": ActivationSpec(kind="float", bits=8),
    "e2m1": ActivationSpec(kind="float", bits=4),
}
rows = hnp.arrays(
    np.float32, (3, 16), elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
)


@pytest.mark.parametrize("kind", SPECS)
@settings(deadline=None, max_examples=60)
@given(x=rows)
def test_codes_and_scales_are_the_formula(kind, x):
    x[np.abs(x) < 1e-6] = 0
    spec = SPECS[kind]
    codes, scale = draw.round_rows(x, spec)
    found = quantize(jnp.asarray(x), spec)
    assert found.codes.dtype == spec.code_dtype
    np.testing.assert_array_equal(draw.numpy_of(found.codes), codes)
    np.testing.assert_allclose(found.scale, scale, rtol=3e-7)


@pytest.mark.parametrize("kind", SPECS)
def test_compiled_codes_are_the_same(kind):
    x = np.random.default_rng(0).standard_normal((64, 192)).astype(np.float32)
    x[:8] = np.round(x[:8] * 16) / 16
    plain = quantize(jnp.asarray(x), SPECS[kind])
    compiled = jax.jit(quantize, static_argnums=1)(jnp.asarray(x), SPECS[kind])
    np.testing.assert_array_equal(draw.numpy_of(plain.codes), draw.numpy_of(compiled.codes))
    np.testing.assert_array_equal(plain.scale, compiled.scale)


def test_ties_round_to_even():
    x = jnp.asarray([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    np.testing.assert_array_equal(quantize(x, SPECS["int8"]).codes, [[127, 0, 2, 2, 0, -2]])
    x = jnp.asarray([[6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]])
    codes = quantize(x, SPECS["e2m1"]).codes.astype(jnp.float32)
    np.testing.assert_array_equal(codes, [[6, 0, 1, 1, 2, 2, 4, 4]])


@pytest.mark.parametrize("kind", SPECS)
def test_empty_and_tiny_rows_are_zero(kind):
    x = jnp.asarray([[0.0, -0.0], [1e-38, -1e-31], [1e-29, 0.0]])
    found = quantize(x, SPECS[kind])
    np.testing.assert_array_equal(found.codes[:2].astype(jnp.float32), 0)
    np.testing.assert_array_equal(found.scale[:2], 0)
    assert float(found.codes[2, 0].astype(jnp.float32)) == SPECS[kind].code_range[1]


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_broken_rows_have_broken_scales(kind, value):
    x = jnp.asarray([[1.0, 2.0], [1.0, value]], jnp.float32)
    scale = quantize(x, SPECS[kind]).scale
    assert np.isfinite(scale[0, 0])
    assert not np.isfinite(scale[1, 0])


def torch_like(x: np.ndarray, dtype) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of compressed-tensors 0.20, every operation rounded to `dtype`."""
    x = x.astype(dtype)
    wide = np.abs(x).max(-1, keepdims=True).astype(np.float32) / np.float32(127.5)
    scale = wide.astype(dtype)
    scaled = (x.astype(np.float32) / scale.astype(np.float32)).astype(dtype)
    return np.rint(np.clip(scaled.astype(np.float32), -128, 127)), scale.astype(np.float32)


@pytest.mark.parametrize("size", [1, 1e-3])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_full_range_is_the_arithmetic_of_compressed_tensors(dtype, size):
    """Row maxima lie on a tie of the codes: another order of operations differs in one row of seven."""
    x = (size * np.random.default_rng(0).standard_normal((2000, 64))).astype(dtype)
    codes, scale = torch_like(x, dtype)
    for run in (quantize, jax.jit(quantize, static_argnums=1)):
        found = run(jnp.asarray(x), SPECS["int8-full"])
        np.testing.assert_array_equal(found.codes, codes)
        np.testing.assert_array_equal(found.scale, scale)


def test_full_range_reaches_the_lowest_code():
    x = jnp.asarray([[127.5, -127.5, 126.5, 1.5]])
    found = quantize(x, SPECS["int8-full"])
    np.testing.assert_array_equal(found.codes, [[127, -128, 126, 2]])
    np.testing.assert_allclose(found.scale, 1)
    narrow = quantize(x, ActivationSpec(bits=4, full_range=True))
    np.testing.assert_array_equal(narrow.codes, [[7, -8, 7, 0]])


def test_group_sums_are_of_the_inputs():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 6)).astype(np.float32))
    assert quantize(x, SPECS["int4"]).sums is None
    sums = quantize(x, SPECS["int4"], 2).sums
    np.testing.assert_allclose(sums, x.reshape(4, 2, 3).sum(-1), rtol=1e-6)


def test_half_precision_scales_change_scales_and_sums_only():
    x = jnp.asarray(np.random.default_rng(2).standard_normal((4, 64)).astype(np.float32))
    half = quantize(x, ActivationSpec(bits=8, scale_dtype="float16"), 1)
    full = quantize(x, SPECS["int8"], 1)
    np.testing.assert_array_equal(half.codes, full.codes)
    for found, wanted in ((half.scale, full.scale), (half.sums, full.sums)):
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, wanted.astype(jnp.float16).astype(jnp.float32))
