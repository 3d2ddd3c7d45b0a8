"""The matmul kernels on a GPU against their references; nothing is emulated here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.pallas.matmul import packed, reference
from specjax.pallas.matmul.api import matmul
from specjax.quant import activations
from specjax.quant.scheme import lookup
from tests.quant import random_linears as draw

pytestmark = pytest.mark.gpu

ROWS = (1, 7, 8, 9, 31, 33, 64, 100)
SHAPES = ((4096, 4096), (1024, 14336), (960, 576), (576, 1536))
# RMS of the error over RMS of the result.
TOLERANCE = {jnp.float16: 2e-3, jnp.bfloat16: 4e-3}


def relative_error(found, wanted) -> float:
    found, wanted = (np.asarray(array.astype(jnp.float32), np.float64) for array in (found, wanted))
    return np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2))


def rows_of(count: int, features: int, seed: int):
    return jax.random.normal(jax.random.key(seed), (count, features), jnp.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("name", "group_size"),
    [
        *(("w4a16", 64), ("w4a16", 32), ("w4a16", -1), ("w4a16", 128)),
        *(("w4a16-asym", 64), ("w4a16-asym", -1), ("w8a16", -1), ("w8a16-asym", 64)),
    ],
)
def test_floats(name, group_size, dtype, shape):
    outputs, inputs = shape
    size = inputs if group_size == -1 or inputs % group_size else group_size
    linear = draw.make(lookup(name), outputs, inputs, size, bias=True)
    packing = packed.pack(linear, 16)
    run = jax.jit(lambda x: matmul(x, packing, bias=linear.bias, backend="mosaic"))
    for rows in ROWS:
        x = rows_of(rows, inputs, rows).astype(dtype)
        wanted = reference.weight_only(x.astype(jnp.float32), linear, linear.bias)
        assert relative_error(run(x), wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "group_size"),
    [
        *(("w4a8", -1), ("w4a8", 64), ("w4a8", 128), ("w4a8-asym", 64), ("w4a8-qqq", -1)),
        *(("w4a8-qqq", 128), ("w4a8-qoq", 128), ("w8a8", -1), ("w8a8", 64)),
        *(("w4a4", 128), ("w4a4", -1), ("w4a4-qqq", 128)),
    ],
)
def test_integers(name, group_size, shape):
    outputs, inputs = shape
    size = inputs if group_size == -1 or inputs % group_size else group_size
    if name == "w4a8-qoq" and size == 128:
        linear = draw.qoq(outputs, inputs)
    else:
        linear = draw.make(lookup(name), outputs, inputs, size, minima=name == "w4a8-qoq")
    packing = packed.pack(linear, 8)
    groups = None if linear.minima is None else linear.minima.shape[1]
    exact = linear.minima is None and (packing.form.per_channel or packing.form.format.two_level)

    @jax.jit
    def run(codes, scale, sums):
        return matmul(codes, packing, x_scale=scale, x_sums=sums, backend="mosaic")

    for rows in ROWS:
        quantized = activations.quantize(
            rows_of(rows, inputs, rows), linear.scheme.activations, groups
        )
        out = run(quantized.codes, quantized.scale, quantized.sums)
        wanted = reference.quantized(
            quantized.codes, quantized.scale, linear, x_sums=quantized.sums
        )
        assert relative_error(out, wanted) < 1e-5
        if exact:
            np.testing.assert_array_equal(out, wanted)


def test_a_token_is_rounded_alike_alone_and_in_a_tree():
    linear = draw.make(lookup("w4a16-asym"), 4096, 4096, 128)
    packing, x = packed.pack(linear, 16), rows_of(64, 4096, 0).astype(jnp.float16)
    run = jax.jit(lambda x: matmul(x, packing, backend="mosaic"))
    tree = np.asarray(run(x))
    for rows in (1, 8, 17):
        np.testing.assert_array_equal(run(x[:rows]), tree[:rows])
