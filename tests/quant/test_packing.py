"""Packings of four-bit codes: inverses, byte-exact layouts, and the narrow device dtypes."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from specjax import errors
from specjax.quant import packing

shapes = hnp.array_shapes(min_dims=1, max_dims=3, max_side=9)
unsigned = shapes.flatmap(
    lambda s: hnp.arrays(np.uint8, (*s[:-1], 2 * s[-1]), elements=st.integers(0, 15))
)
signed = shapes.flatmap(
    lambda s: hnp.arrays(np.int8, (*s[:-1], 2 * s[-1]), elements=st.integers(-8, 7))
)


@given(unsigned)
def test_nibbles_round_trip(codes):
    packed = packing.pack_nibbles(codes)
    assert packed.shape == (*codes.shape[:-1], codes.shape[-1] // 2)
    np.testing.assert_array_equal(packing.unpack_nibbles(packed), codes)


@given(signed)
def test_signed_nibbles_round_trip(codes):
    packed = packing.pack_nibbles(codes)
    np.testing.assert_array_equal(packing.unpack_nibbles(packed, signed=True), codes)
    offset = packing.unpack_nibbles(packing.signed_nibbles(packed))
    np.testing.assert_array_equal(offset.astype(np.int8) - 8, codes)


@given(
    hnp.arrays(np.int32, st.tuples(st.integers(1, 4), st.integers(1, 4))),
    st.sampled_from([0, 1, -1]),
)
def test_words_round_trip(words, axis):
    codes = packing.unpack_words(words, axis)
    assert codes.shape[axis] == 8 * words.shape[axis]
    np.testing.assert_array_equal(packing.pack_words(codes, axis), words)
    unpacked = packing.unpack_nibbles(packing.bytes_of_words(words, axis))
    np.testing.assert_array_equal(unpacked, np.moveaxis(codes, axis, -1))


def test_layouts_are_those_of_the_files():
    codes = np.arange(16, dtype=np.uint8).reshape(2, 8)
    np.testing.assert_array_equal(packing.pack_nibbles(codes)[0], [0x10, 0x32, 0x54, 0x76])
    np.testing.assert_array_equal(packing.pack_words(codes, 1), [[0x76543210], [-0x01234568]])
    down = packing.pack_words(np.ascontiguousarray(codes.T), 0)
    np.testing.assert_array_equal(down, [[0x76543210, -0x01234568]])
    np.testing.assert_array_equal(packing.pack_nibbles(np.array([-8, 7], np.int8)), [0x78])


@settings(deadline=None, max_examples=20)
@given(hnp.arrays(np.uint8, (3, 6), elements=st.integers(0, 15)))
def test_device_codes_round_trip(codes):
    shifted = codes.astype(np.int8) - np.int8(8)
    for host, dtype in ((codes, jnp.uint4), (shifted, jnp.int4)):
        device = packing.to_device(host, dtype)
        assert device.dtype == dtype
        np.testing.assert_array_equal(device.astype(host.dtype), host)
        np.testing.assert_array_equal(packing.bytes_from_codes(device), packing.pack_nibbles(host))


def test_words_become_device_codes_without_unpacking():
    rng = np.random.default_rng(0)
    words = rng.integers(-(2**31), 2**31, (4, 6)).astype(np.int32)
    codes = packing.unpack_words(words, 0).T
    packed = packing.bytes_of_words(words, 0)
    np.testing.assert_array_equal(
        packing.codes_from_bytes(packed, jnp.uint4).astype(jnp.uint8), codes
    )
    centred = packing.codes_from_bytes(packing.signed_nibbles(packed), jnp.int4)
    np.testing.assert_array_equal(centred.astype(jnp.int8), codes.astype(np.int8) - 8)


def test_four_bit_arrays_take_half_a_byte_per_code():
    for dtype in (jnp.int4, jnp.uint4, jnp.float4_e2m1fn):
        assert jnp.zeros((64, 256), dtype).on_device_size_in_bytes() == 64 * 128


def test_float_codes_and_odd_widths_reach_the_device():
    values = np.array([[0.5, -6, 1.5]], np.float32)
    device = packing.to_device(values, jnp.float4_e2m1fn)
    np.testing.assert_array_equal(device.astype(jnp.float32), values)
    odd = packing.to_device(np.array([[1, 2, 3]], np.uint8), jnp.uint4)
    np.testing.assert_array_equal(odd.astype(jnp.uint8), [[1, 2, 3]])


def test_bad_shapes_and_codes_are_refused():
    with pytest.raises(errors.SpecjaxError, match=r"axis -1 of shape \(2, 3\).*multiple of 2"):
        packing.pack_nibbles(np.zeros((2, 3), np.uint8))
    with pytest.raises(errors.SpecjaxError, match=r"axis 0 of shape \(12, 2\).*multiple of 8"):
        packing.pack_words(np.zeros((12, 2), np.uint8), 0)
    with pytest.raises(errors.SpecjaxError, match="codes run from 0 to 9; int4 holds -8 to 7"):
        packing.to_device(np.array([[0, 9]], np.uint8), jnp.int4)
