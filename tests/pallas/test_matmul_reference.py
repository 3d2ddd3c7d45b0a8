"""The references of all matmul ops against numpy in float64 and int64, at the edges of tiles."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import errors
from specjax.pallas import dispatch
from specjax.pallas.matmul import api, backends, reference
from specjax.quant import activations
from specjax.quant.linear import QuantizedLinear
from specjax.quant.scheme import SCHEMES, lookup
from tests import paths
from tests.quant import random_linears as draw

ROWS = (1, 7, 8, 9, 31, 33, 64)
WEIGHT_ONLY = ["w8a16", "w8a16-asym", "w4a16", "w4a16-asym", "w4a16-qqq", "w4a16-qoq", "fp8-a16"]
QUANTIZED = ["w8a8", "w4a8", "w4a8-asym", "w4a8-qqq", "w4a8-qoq", "w4a4", "w4a4-asym", "w4a4-qoq"]
FLOATS = ["fp8", "fp4-a8", "fp4-a4"]


def inputs(rows: int, features: int, seed: int = 1) -> np.ndarray:
    """Rows of different magnitudes with an outlier each, as activations have."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, features)) * np.exp(rng.normal(0, 2, (rows, 1)))
    x[:, 3] *= 10
    return x.astype(np.float32)


def expected(linear: QuantizedLinear, x: np.ndarray) -> np.ndarray:
    """The op in float64 and int64: rounding by `round_rows`, one accumulator per group."""
    spec = linear.scheme.activations
    bias = 0 if linear.bias is None else draw.numpy_of(linear.bias)
    if spec is None:
        return x.astype(np.float64) @ draw.dense_weight(linear).T + bias
    if linear.perm is not None:
        x = x[:, np.asarray(linear.perm)]
    codes, scale = draw.round_rows(x, spec)
    values, scales = draw.runtime_weight(linear)
    groups = scales.shape[1]
    exact = np.int64 if spec.kind == "int" else np.float64
    split = [a.astype(exact).reshape(len(a), groups, -1) for a in (codes, values)]
    out = np.einsum("mgk,ngk,ng->mn", *split, scales, optimize=False) * scale
    if linear.minima is not None:
        sums = x.astype(np.float64).reshape(len(x), linear.minima.shape[1], -1).sum(axis=-1)
        out += sums @ draw.numpy_of(linear.minima).T
    return out + bias


def assert_close(found, wanted: np.ndarray, tolerance: float = 2e-6) -> None:
    """Within a few float32 rounding errors of the row's size."""
    size = np.abs(wanted).max(axis=-1, keepdims=True)
    error = np.abs(np.asarray(found, np.float64) - wanted) / size
    assert error.max() < tolerance, error.max()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ["w4a16", "w4a8-qqq", "w4a8", "w8a8"])
def test_rows_at_tile_edges(name, rows):
    linear = draw.make(lookup(name), 192, 576, 64 if name.startswith("w4") else 576)
    x = inputs(rows, 576)
    assert_close(linear(jnp.asarray(x)), expected(linear, x))


@pytest.mark.parametrize("shape", [(576, 1536), (1536, 576), (192, 192)])
@pytest.mark.parametrize("name", ["w4a16", "w4a8-qqq", "w4a8", "w8a8"])
def test_shapes(name, shape):
    check_scheme(name, *shape)


@pytest.mark.parametrize("name", [*WEIGHT_ONLY, *QUANTIZED, *FLOATS, "fp4"])
def test_every_scheme(name):
    check_scheme(name, 64, 576)


def check_scheme(name: str, outputs: int, features: int) -> None:
    per_channel = name.startswith(("w8", "fp8"))
    linear = draw.make(lookup(name), outputs, features, features if per_channel else 32, bias=True)
    x = inputs(7, features)
    assert_close(linear(jnp.asarray(x)), expected(linear, x))


@pytest.mark.parametrize("group_size", [32, 64, 128, 384])
@pytest.mark.parametrize("name", ["w4a16", "w4a16-asym", "w4a8", "w4a8-qqq", "w4a8-qoq", "w4a4"])
def test_group_sizes(name, group_size):
    linear = draw.make(lookup(name), 64, 384, group_size, perm=True)
    x = inputs(9, 384)
    assert_close(linear(jnp.asarray(x)), expected(linear, x))


@pytest.mark.parametrize(
    ("name", "group_size"),
    [
        *(("w4a16-asym", 64), ("w4a8-asym", 64), ("w4a4-asym", 64)),
        *(("w4a16-asym", 192), ("w4a8-qoq", 192), ("w4a16-qoq", 192)),
    ],
)
def test_minima(name, group_size):
    linear = draw.make(lookup(name), 64, 192, group_size, minima=True, perm=True, bias=True)
    x = inputs(5, 192)
    assert_close(linear(jnp.asarray(x)), expected(linear, x))


@pytest.mark.parametrize("features", [192, 576, 1536, 14336])
@pytest.mark.parametrize("extreme", [False, True])
def test_int_accumulators_are_exact(features, extreme):
    rng = np.random.default_rng(2)
    x = rng.integers(-127, 128, (9, features)).astype(np.int8)
    codes = rng.integers(-128, 128, (33, features)).astype(np.int8)
    if extreme:
        x[:], codes[:] = 127, -128
    found = jax.jit(reference.accumulate)(x, codes)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, x.astype(np.int64) @ codes.astype(np.int64).T)


@pytest.mark.parametrize("name", ["w4a8-qqq", "w4a8-qoq"])
def test_second_level_is_exact_for_every_code_and_scale(name):
    """All codes against all int8 (QoQ) or many float16 (QQQ) scales; the rest wraps or clips."""
    scheme = lookup(name)
    signed = scheme.weights.symmetric
    codes = np.tile(np.arange(16, dtype=np.uint8), (256, 2))
    codes = (codes.astype(np.int8) - 8) if signed else codes
    rng = np.random.default_rng(3)
    device = jnp.asarray(codes).astype(scheme.weights.code_dtype)
    if signed:
        parts = dict(scales=jnp.asarray(rng.uniform(0, 15.87, (256, 2)).astype(np.float16)))
        parts["scales"] = parts["scales"].at[:32, 0].set(jnp.arange(32, dtype=jnp.float16) / 2)
    else:
        scales = np.arange(256) % 128
        parts = dict(
            scales=jnp.asarray(np.stack([scales, scales[::-1]], axis=1).astype(np.int8)),
            zeros=jnp.asarray(rng.integers(-128, 128, (256, 2)).astype(np.int8)),
        )
    linear = QuantizedLinear(
        codes=device,
        **parts,
        channel_scales=jnp.ones(256, jnp.float32),
        scheme=scheme,
        group_size=16,
    )
    found, _ = reference.runtime(linear)
    np.testing.assert_array_equal(np.asarray(found), draw.runtime_weight(linear)[0])


def test_qqq_rounding_is_the_float16_kernel_trick():
    """Rounding q * s to even equals one float16 fused multiply-add against 1152 (the kernel)."""
    scales = np.arange(1, 0x4BF0, 7, dtype=np.uint16).view(np.float16)
    codes = np.arange(-8, 8, dtype=np.int8)
    exact = codes.astype(np.float64) * scales.astype(np.float64)[:, None]
    fused = (exact + 1152).astype(np.float16).astype(np.float64) - 1152
    fits = np.abs(exact) <= 127
    linear = QuantizedLinear(
        codes=jnp.asarray(np.tile(codes, (len(scales), 1))).astype(jnp.int4),
        scales=jnp.asarray(scales[:, None]),
        channel_scales=jnp.ones(len(scales), jnp.float32),
        scheme=SCHEMES["w4a8-qqq"],
        group_size=16,
    )
    found = np.asarray(reference.runtime(linear)[0])
    np.testing.assert_array_equal(found[fits], fused[fits])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["w4a16", "w8a16", "w4a8", "w8a8", "fp8"])
def test_half_precision_inputs(name, dtype):
    linear = draw.make(lookup(name), 64, 192, 64 if "4" in name else 192)
    x = jnp.asarray(inputs(7, 192) / 30).astype(dtype)
    out = linear(x)
    assert out.dtype == dtype
    assert_close(out.astype(jnp.float32), expected(linear, draw.numpy_of(x)), 0.02)


@pytest.mark.parametrize("name", [*QUANTIZED, *FLOATS, "w4a16"])
def test_zero_and_broken_rows_stay_apart(name):
    per_channel = name.startswith(("w8", "fp8"))
    linear = draw.make(lookup(name), 64, 192, 192 if per_channel else 32)
    x = inputs(5, 192)
    alone = np.asarray(linear(jnp.asarray(x)))
    x[1], x[2, 5], x[3, 7] = 0, np.nan, np.inf
    found = np.asarray(linear(jnp.asarray(x)))
    np.testing.assert_array_equal(found[[0, 4]], alone[[0, 4]])
    np.testing.assert_array_equal(found[1], 0)
    assert not np.isfinite(found[2:4]).any()


def test_leading_axes_and_empty_input():
    linear = draw.make(SCHEMES["w4a8"], 64, 192, 32)
    x = jnp.asarray(inputs(12, 192))
    np.testing.assert_array_equal(linear(x.reshape(3, 4, 192)).reshape(12, 64), linear(x))
    assert linear(x[:0]).shape == (0, 64)
    assert linear(x[0]).shape == (64,)


def qserve_linear(name: str, key: str, golden: dict) -> QuantizedLinear:
    """A linear of the fixture; QoQ codes are the unpacked ones of the golden."""
    from safetensors.numpy import load_file

    stored = load_file(paths.fixture(name) / "quant_model.safetensors")
    if name == "qserve-w8a8":
        codes = jnp.asarray(stored[f"{key}.weight"])
        scales = jnp.asarray(stored[f"{key}.dequant_scale"])[:, None]
        static = dict(scheme=lookup("w8a8-s16"), group_size=codes.shape[1])
        return QuantizedLinear(codes=codes, scales=scales, **static)
    # Output feature of each stored column: blocks of 32 in the order 0, 8, 16, 24, 1, 9, ...
    outputs = stored[f"{key}.s1_scales"].shape[0]
    order = np.arange(outputs).reshape(-1, 4, 8).swapaxes(1, 2).ravel()
    second = {}
    for part in ("s2_scales", "s2_zeros"):
        second[part] = np.empty_like(stored[f"{key}.{part}"].T)
        second[part][order] = stored[f"{key}.{part}"].T
    return QuantizedLinear(
        codes=jnp.asarray(golden[f"codes.{key}"]).astype(jnp.uint4),
        scales=jnp.asarray(second["s2_scales"]),
        zeros=jnp.asarray(second["s2_zeros"]),
        channel_scales=jnp.asarray(stored[f"{key}.s1_scales"]),
        scheme=lookup("w4a8-qoq-s16"),
        group_size=128,
    )


@pytest.mark.parametrize("name", ["qserve-w8a8", "qserve-w4a8-g128"])
def test_qserve_golden_accumulators_and_outputs(name):
    """The int8 codes, int32 accumulators and float16 outputs that the tool itself recorded."""
    from safetensors.numpy import load_file

    golden = load_file(paths.golden(f"{name}.safetensors"))
    key = "model.layers.0.mlp.down_proj"
    x, x_int8, x_scale, acc, out_fp16 = (
        golden[f"linear.{key}.{part}"] for part in ("x", "x_int8", "x_scale", "acc", "out_fp16")
    )
    linear = qserve_linear(name, key, golden)
    rows = golden[f"dequant.{key}.weight"]
    dense = np.asarray(linear.dequantize())
    np.testing.assert_array_equal(dense[:: -(-len(dense) // len(rows))], rows)
    codes, _ = reference.runtime(linear)
    np.testing.assert_array_equal(codes, golden.get(f"w8.{key}", codes))
    rows = activations.quantize(jnp.asarray(x), linear.scheme.activations)
    np.testing.assert_array_equal(rows.codes, x_int8)
    np.testing.assert_array_equal(rows.scale, x_scale.astype(np.float32))
    np.testing.assert_array_equal(reference.accumulate(rows.codes, codes), acc)
    out = np.asarray(linear(jnp.asarray(x)))
    ulps = out.view(np.int16).astype(np.int32) - out_fp16.view(np.int16)
    assert np.abs(ulps).max() <= 1


def test_backends_are_named_or_refused(caplog):
    linear = draw.make(SCHEMES["w4a16"], 64, 192, 32)
    x = jnp.asarray(inputs(1, 192))
    for backend in ("mosaic", "triton"):
        with pytest.raises(errors.SpecjaxError, match=rf"{backend}.*no NVIDIA GPU"):
            api.matmul(x, linear, backend=backend)
    floats = draw.make(SCHEMES["fp8"], 64, 192, 192)
    with pytest.raises(errors.SpecjaxError, match=r"mosaic.*available: xla"):
        floats.with_backend("mosaic")(x)
    with pytest.raises(errors.SpecjaxError, match=r"cuda.*known: auto, xla"):
        offered = backends.implementations(backends.format_of(linear), 16)
        dispatch.run("matmul", "cuda", offered, x, linear)
    dispatch._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="specjax.pallas.dispatch"):
        for _ in range(2):
            out = api.matmul(x, linear)
    assert len(caplog.records) == 1
    assert "matmul_w4a16: backend auto runs xla (mosaic: no NVIDIA GPU" in caplog.text
    np.testing.assert_array_equal(out, api.matmul(x, linear, backend="xla"))


def test_auto_passes_over_an_implementation_that_refuses(caplog):
    kernel = dispatch.Implementation(
        backend="mosaic", run=lambda x: x + 1, refuses=lambda x: "K=3" if x == 3 else None
    )
    offered = (kernel, dispatch.Implementation(backend="xla", run=lambda x: x))
    assert dispatch.run("op", "auto", offered, 2) == 3
    with caplog.at_level(logging.INFO, logger="specjax.pallas.dispatch"):
        assert dispatch.run("op", "auto", offered, 3) == 3
    assert "runs xla (triton: not implemented; mosaic: K=3)" in caplog.text
    with pytest.raises(errors.SpecjaxError, match=r"op cannot run with backend='mosaic'.*K=3"):
        dispatch.run("op", "mosaic", offered, 3)
