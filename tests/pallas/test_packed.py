"""The run-time form of weights: unpacking gives the canonical arrays back, whatever the shape."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specjax import errors
from specjax.pallas.matmul import packed
from specjax.quant.scheme import lookup
from tests.quant import random_linears as draw

ARRAYS = ("codes", "scales", "zeros", "minima", "channel_scales")


def assert_equal(left, right) -> None:
    for name in ARRAYS:
        ours, theirs = getattr(left, name), getattr(right, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, name
            np.testing.assert_array_equal(draw.numpy_of(ours), draw.numpy_of(theirs), name)
    assert (left.group_size, left.levels) == (right.group_size, right.levels)


@settings(max_examples=10, deadline=None)
@given(
    name=st.sampled_from(["w4a16", "w4a16-asym", "w4a8", "w8a8", "w8a16-asym", "w4a4-asym"]),
    outputs=st.integers(1, 300),
    groups=st.integers(1, 5),
    group_size=st.sampled_from([32, 64, 128, 256, 384]),
    operand_bits=st.sampled_from([16, 8]),
    minima=st.booleans(),
)
def test_unpack_inverts_pack(name, outputs, groups, group_size, operand_bits, minima):
    if operand_bits == 8:
        group_size = max(group_size, 64)
    linear = draw.make(lookup(name), outputs, groups * group_size, group_size, minima=minima)
    assert_equal(packed.unpack(packed.pack(linear, operand_bits)), linear)


@pytest.mark.parametrize("operand_bits", [16, 8])
@pytest.mark.parametrize("inputs", [192, 576, 1536, 200])
def test_per_channel_of_any_width(inputs, operand_bits):
    linear = draw.make(lookup("w4a8"), 192, inputs, inputs, scale_dtype=jnp.float32)
    packing = packed.pack(linear, operand_bits)
    assert packing.codes.shape == (2, -(-inputs // 128), 128, 64)
    assert packing.scales.shape == (2, 1, 128)
    assert_equal(packed.unpack(packing), linear)


@pytest.mark.parametrize(
    "make", [lambda: draw.make(lookup("w4a8-qqq"), 130, 384, 128), lambda: draw.qoq(130, 384)]
)
def test_second_levels(make):
    linear = make()
    assert_equal(packed.unpack(packed.pack(linear, 8)), linear)


def test_bytes_and_padding():
    linear = draw.make(lookup("w4a16"), 130, 320, 64)
    packing = packed.pack(linear, 16)
    assert packing.codes.dtype == jnp.uint8 and packing.codes.shape == (2, 3, 128, 64)
    assert packing.scales.shape == (2, 6, 128)
    codes = packing.form.format.loaded(packing.codes)
    assert codes.dtype == jnp.int4 and codes.shape == (2, 3, 128, 128)
    assert not np.any(np.asarray(packing.scales)[:, 5]) and not np.any(
        np.asarray(packing.codes)[1, :, 2:]
    )


def test_abstract_weights_pack():
    """Ahead-of-time compilation packs shapes only."""
    linear = draw.make(lookup("w4a16-asym"), 256, 256, 64)
    abstract = jax.eval_shape(lambda weight: packed.pack(weight, 16), linear)
    concrete = packed.pack(linear, 16)
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), abstract, concrete)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    ("linear", "operand_bits", "message"),
    [
        (lambda: draw.make(lookup("fp4"), 64, 128, 32), 16, "float4_e2m1fn"),
        (lambda: draw.make(lookup("w4a16"), 64, 288, 96), 16, "group_size=96"),
        (lambda: draw.make(lookup("w4a8"), 64, 128, 32), 8, "group_size=32"),
        (lambda: draw.make(lookup("w4a8-qqq"), 64, 256, 128), 16, "second-level"),
        (lambda: draw.make(lookup("w4a8-qoq"), 64, 256, 128), 8, "wrap around"),
        (lambda: _inexact_qqq(), 8, "float16"),
        (lambda: _large_qqq(), 8, "exceed"),
    ],
)
def test_what_has_no_packed_form(linear, operand_bits, message):
    with pytest.raises(errors.ConfigError, match=message):
        packed.pack(linear(), operand_bits)


def _inexact_qqq():
    linear = draw.make(lookup("w4a8-qqq"), 64, 256, 128, scale_dtype=jnp.float32)
    return dataclasses.replace(linear, scales=linear.scales + 1e-4)


def _large_qqq():
    linear = draw.make(lookup("w4a8-qqq"), 64, 256, 128)
    return dataclasses.replace(linear, scales=linear.scales + jnp.float16(16))
