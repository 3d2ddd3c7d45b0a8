"""The matmul kernels in Mosaic's interpreter against their references, races included.

The interpreter has neither wgmma with a register operand, nor mma.sync, nor inline assembly, so
there a kernel widens codes and multiplies with plain array operations (`KernelFormat.widened`,
`_emulated_product`). Everything else is the code that is compiled: tiles, pipeline, barriers,
tables, sums of groups, splits, stores. What is replaced is covered by `test_layouts.py` and
`test_bit_tricks.py`.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from specjax import errors
from specjax.pallas.matmul import mosaic, packed, reference
from specjax.pallas.matmul.plan import Config
from specjax.quant import activations
from specjax.quant.scheme import lookup
from tests.quant import random_linears as draw

HOPPER, AMPERE = (9, 0), (8, 0)
slow = pytest.mark.slow
# One step at a time, two stages: the ring wraps around within a few tiles.
SMALL = Config(tiles_per_step=1, num_stages=2, splits=1)


@pytest.fixture(autouse=True)
def fresh_interpreter():
    """A kernel that failed leaves the interpreter's state behind."""
    yield
    gpu_callbacks.reset_gpu_interpret_mode_state()


def interpreted(*arguments, arch=HOPPER, **kwargs):
    """The kernel in the interpreter, which must see no race."""
    params = plgpu.InterpretGPUParams(detect_races=True)
    out = mosaic.matmul(*arguments, arch=arch, interpret=params, **kwargs)
    out = np.asarray(out.astype(jnp.float32))
    assert not gpu_callbacks.get_races().races_found
    return out


def rows_of(count: int, features: int, dtype, seed: int = 1):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((count, features))).astype(dtype)


def relative_error(found, wanted) -> float:
    found, wanted = (np.asarray(array, np.float64) for array in (found, wanted))
    return np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2))


def check_float(
    linear, rows: int, config: Config | None = SMALL, dtype=jnp.float16, arch=HOPPER
) -> None:
    x = rows_of(rows, linear.in_features, dtype)
    weight = packed.pack(linear, 16)
    out = interpreted(x, weight, config=config, bias=linear.bias, arch=arch)
    wanted = reference.weight_only(x.astype(jnp.float32), linear, linear.bias)
    assert out.shape == (rows, linear.out_features)
    assert relative_error(out, wanted) < (3e-4 if dtype == jnp.float16 else 2.5e-3)


def check_integer(
    linear, rows: int, config: Config | None = SMALL, operand_bits: int = 8, arch=HOPPER
) -> None:
    """Accumulators are exact, so that what is per channel must agree to the last bit."""
    x = rows_of(rows, linear.in_features, jnp.float32)
    groups = None if linear.minima is None else linear.minima.shape[1]
    quantized = activations.quantize(x, linear.scheme.activations, groups)
    packing = packed.pack(linear, operand_bits)
    given = dict(x_scale=quantized.scale, x_sums=quantized.sums, bias=linear.bias)
    out = interpreted(quantized.codes, packing, **given, config=config, arch=arch)
    wanted = reference.matmul(quantized.codes, linear, **given)
    if packing.form.per_channel or packing.form.format.two_level:
        np.testing.assert_array_equal(out, np.asarray(wanted))
    assert relative_error(out, wanted) < 1e-6


def slowly(*values):
    """Parameters of tests that only `make test-full` runs."""
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=slow) for v in values]


@pytest.mark.parametrize("rows", [1, 33, *slowly(7, 8, 9, 31, 64)])
def test_w4a16_rows(rows):
    check_float(draw.make(lookup("w4a16"), 128, 256, 128), rows)


@pytest.mark.parametrize(
    ("outputs", "inputs", "config"),
    [
        (192, 576, Config(tiles_per_step=1, num_stages=2, splits=2)),  # parts of 2 and 3 steps
        *slowly(
            (64, 1536, Config(tiles_per_step=2, num_stages=2, splits=3)),
            (192, 192, Config(tiles_per_step=2, num_stages=1, splits=1)),
        ),
    ],
)
def test_w4a16_shapes(outputs, inputs, config):
    check_float(draw.make(lookup("w4a16"), outputs, inputs, 64, bias=True), 3, config)


@pytest.mark.parametrize(
    ("name", "group_size", "minima"),
    [
        ("w4a16-asym", 32, True),
        *slowly(
            ("w4a16-asym", 64, False),
            ("w4a16-asym", 320, True),
            ("w4a16", 32, False),
            ("w4a16", 320, False),
            ("w4a16-asym", 320, False),
        ),
    ],
)
def test_w4a16_forms(name, group_size, minima):
    linear = draw.make(lookup(name), 100, 320, group_size, minima=minima)
    check_float(linear, 5)


@pytest.mark.parametrize(
    ("inputs", "rows", "minima"),
    [
        (640, 3, False),
        *slowly((640, 3, True), (576, 33, False), (576, 33, True), (11008, 8, False)),
    ],
)
def test_sums_of_groups_in_few_tiles_a_step(inputs, rows, minima):
    """Slots of their ring are wider than the rows; tiles as a GPU gets them."""
    group_size = 128 if inputs % 128 == 0 else 64
    linear = draw.make(lookup("w4a16-asym"), 64, inputs, group_size, minima=minima)
    check_float(linear, rows, config=None)


@pytest.mark.parametrize("inputs", [640, *slowly(11008)])
def test_progressive_sums_in_few_tiles_a_step(inputs):
    check_integer(draw.qoq(64, inputs), 3, config=None)


@slow
@pytest.mark.parametrize("inputs", [4096, 14336])
def test_inputs_of_an_8b_model(inputs):
    """All inputs of its projections, with the tiles and splits that an H200 gets."""
    check_float(draw.make(lookup("w4a16"), 128, inputs, 128), 8, config=None)
    check_integer(draw.make(lookup("w4a8"), 128, inputs, 128), 8, config=None)
    check_integer(draw.make(lookup("w8a8"), 128, inputs, inputs), 8, config=None)


@slow
def test_w4a16_bfloat16():
    linear = draw.make(lookup("w4a16"), 128, 256, 128, scale_dtype=jnp.bfloat16)
    check_float(linear, 8, dtype=jnp.bfloat16)


@slow
def test_w4a16_of_weights_packed_for_integers():
    """QSpec drafts and verifies from the same codes under two widths of inputs."""
    linear = draw.make(lookup("w4a16"), 128, 256, 128)
    x = rows_of(4, 256, jnp.float16)
    outs = [interpreted(x, packed.pack(linear, bits), config=SMALL) for bits in (16, 8)]
    np.testing.assert_array_equal(*outs)


def test_a_token_is_rounded_alike_alone_and_in_a_tree():
    linear = draw.make(lookup("w4a16"), 128, 512, 128)
    packing, x = packed.pack(linear, 16), rows_of(33, 512, jnp.float16)
    alone = interpreted(x[:1], packing, bias=jnp.zeros(128, jnp.float16))
    among = interpreted(x, packing, bias=jnp.zeros(128, jnp.float16))
    np.testing.assert_array_equal(alone[0], among[0])


def test_parts_sum_groups_as_products_do(monkeypatch):
    """In an order that does not depend on the rows: the sums of both come from one function."""
    packing = packed.pack(draw.make(lookup("w4a16-asym"), 64, 384, 128), 16)
    x, seen = rows_of(9, 384, jnp.float16), []

    def partial_sums(plan, inputs, **kwargs):
        seen.append(np.asarray(inputs["sums"]))
        return jnp.zeros((plan.config.splits, plan.rows, 128), plan.out_dtype)

    monkeypatch.setattr(mosaic.wgmma, "partial_sums", partial_sums)
    for run in (mosaic.matmul, mosaic.float_parts):
        for rows in (x, x[:1]):
            run(rows, packing, arch=HOPPER)
    product, alone, parts, parts_alone = seen
    np.testing.assert_array_equal(parts, product)
    np.testing.assert_array_equal(parts_alone, alone)
    np.testing.assert_array_equal(parts_alone[:, 0], parts[:, 0])
    groups = np.asarray(x[0], np.float32).reshape(3, 128)
    while groups.shape[1] > 1:
        groups = groups[:, : groups.shape[1] // 2] + groups[:, groups.shape[1] // 2 :]
    np.testing.assert_array_equal(parts[:, 0], groups[:, 0])


@pytest.mark.parametrize("rows", [9, *slowly(1, 33, 50)])
def test_w4a8_rows(rows):
    check_integer(draw.make(lookup("w4a8"), 128, 256, 256), rows)


@pytest.mark.parametrize(
    ("name", "group_size", "minima"),
    [
        ("w4a8", 128, False),
        ("w4a8-qoq", 384, True),
        ("w4a8-qqq", 128, False),
        *slowly(
            ("w4a8", 64, False),
            ("w4a8-asym", 128, False),
            ("w4a8-asym", 64, True),
            ("w4a8-asym", 384, False),
            ("w4a8-qqq", 384, False),
        ),
    ],
)
def test_w4a8_forms(name, group_size, minima):
    linear = draw.make(lookup(name), 192, 384, group_size, minima=minima, bias=True)
    check_integer(linear, 3)


def test_w4a8_progressive():
    check_integer(draw.qoq(128, 384), 3)


@slow
@pytest.mark.parametrize("arch", [HOPPER, AMPERE])
@pytest.mark.parametrize("inputs", [8064, 8192])  # sums are shifted back at the end, and by groups
def test_w4a8_progressive_sums_stay_in_int32(inputs, arch):
    linear = draw.qoq(64, inputs)
    extreme = dict(
        codes=jnp.zeros_like(linear.codes),
        scales=jnp.full_like(linear.scales, 8),
        zeros=jnp.full_like(linear.zeros, -128),
        channel_scales=jnp.ones_like(linear.channel_scales),
        bias=None,
    )
    linear = dataclasses.replace(linear, **extreme)
    x, scale = jnp.full((3, inputs), -128, jnp.int8), jnp.ones((3, 1))
    config = Config(tiles_per_step=1, num_stages=2, splits=1)
    packing = packed.pack(linear, 8)
    out = interpreted(x, packing, x_scale=scale, config=config, arch=arch)
    np.testing.assert_array_equal(out, reference.quantized(x, scale, linear))
    assert out[0, 0] == 2**14 * inputs


@pytest.mark.parametrize(
    ("group_size", "arch", "operand_bits"),
    [
        (128, AMPERE, 16),  # native int4, and the weights of a W4A16 draft under 4-bit inputs
        *slowly(
            (128, HOPPER, 16), (128, HOPPER, 8), (256, HOPPER, 8), (256, AMPERE, 8), (64, AMPERE, 8)
        ),
    ],
)
def test_w4a4(group_size, arch, operand_bits):
    linear = draw.make(lookup("w4a4"), 128, 256, group_size)
    check_integer(linear, 8, operand_bits=operand_bits, arch=arch)


@slow
@pytest.mark.parametrize("name", ["w4a4-asym", "w4a4-qqq"])
def test_w4a4_forms_before_hopper(name):
    check_integer(draw.make(lookup(name), 128, 256, 128), 5, arch=AMPERE)


@pytest.mark.parametrize(
    ("name", "group_size", "rows"),
    [
        ("w4a16", 64, 33),
        *slowly(
            ("w4a16-asym", 32, 1),
            ("w4a16", 576, 9),
            ("w8a16", 576, 3),
        ),
    ],
)
def test_floats_before_hopper(name, group_size, rows):
    config = Config(tiles_per_step=1, num_stages=2, splits=2)
    linear = draw.make(lookup(name), 192, 576, group_size, bias=True)
    check_float(linear, rows, config, arch=AMPERE)


@pytest.mark.parametrize(
    ("name", "group_size"),
    [
        ("w4a8-qqq", 128),
        *slowly(("w4a8", 384), ("w4a8-asym", 64), ("w8a8", 384)),
    ],
)
def test_integers_before_hopper(name, group_size):
    check_integer(draw.make(lookup(name), 128, 384, group_size), 9, arch=AMPERE)


@pytest.mark.parametrize("group_size", [576, *slowly(64)])
def test_w8a8(group_size):
    config = Config(tiles_per_step=1, num_stages=2, splits=2)
    linear = draw.make(lookup("w8a8"), 64, 576, group_size)
    check_integer(linear, 9, config)


@pytest.mark.parametrize(
    ("name", "group_size", "arch"),
    [
        ("w8a16-asym", 64, AMPERE),
        *slowly(("w8a16", 256, HOPPER), ("w8a16-asym", 64, HOPPER)),
    ],
)
def test_w8a16(name, group_size, arch):
    check_float(draw.make(lookup(name), 64, 256, group_size), 8, arch=arch)


def test_a_config_that_does_not_fit_is_refused():
    linear = draw.make(lookup("w4a16"), 128, 384, 128)
    x = rows_of(1, 384, jnp.float16)
    for config in (
        Config(tiles_per_step=2, num_stages=2, splits=1),
        Config(tiles_per_step=1, num_stages=2, splits=4),
    ):
        with pytest.raises(errors.ConfigError, match="does not fit"):
            interpreted(x, packed.pack(linear, 16), config=config)
