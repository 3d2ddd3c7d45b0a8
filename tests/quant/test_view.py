"""Views of quantized weights: shared arrays under other activations, and forms that compute the
same.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from specjax import errors
from specjax.pallas.matmul import reference
from specjax.quant import activations, view
from specjax.quant.dense_linear import Linear
from specjax.quant.scheme import SCHEMES, lookup
from tests.quant import random_linears as draw


class Model(nnx.Module):
    """Linears of several kinds at the paths a model has."""

    def __init__(self, **linears):
        self.layers = nnx.List([nnx.Dict(linears)])
        self.norm = nnx.Param(jnp.ones(4))


def rows(features: int, count: int = 5):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal((count, features)).astype(np.float32))


def dense(outputs: int, features: int, bias: bool = False) -> Linear:
    rng = np.random.default_rng(outputs)
    weight = jnp.asarray(rng.standard_normal((outputs, features)).astype(np.float32))
    return Linear(weight, jnp.arange(outputs, dtype=jnp.float32) if bias else None)


@pytest.fixture
def model():
    q_proj, o_proj = (draw.make(SCHEMES["w4a16"], n, 64, 32, seed=n) for n in (32, 64))
    return Model(q_proj=q_proj, o_proj=o_proj, gate=dense(8, 64))


@pytest.mark.parametrize("name", ["w4a4", "w4a8", "w4a16"])
def test_with_scheme_shares_every_buffer(model, name):
    other = view.with_scheme(model, name)
    assert {linear.scheme.name for _, linear in view.quantized_linears(other)} == {name}
    before, after = jax.tree.leaves(model), jax.tree.leaves(other)
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert {linear.scheme.name for _, linear in view.quantized_linears(model)} == {"w4a16"}


def test_with_scheme_computes_under_the_other_activations(model):
    x = rows(64)
    linear = view.with_scheme(model, SCHEMES["w4a8"]).layers[0]["q_proj"]
    quantized = activations.quantize(x, SCHEMES["w4a8"].activations)
    rounded = quantized.codes.astype(jnp.float32) * quantized.scale
    np.testing.assert_allclose(linear(x), rounded @ linear.dequantize().T, rtol=1e-4, atol=1e-4)


def test_with_scheme_keeps_linears_of_other_codes(model):
    model.layers[0]["head"] = draw.make(SCHEMES["w8a16"], 16, 64, 64)
    names = {
        path: linear.scheme.name
        for path, linear in view.quantized_linears(view.with_scheme(model, "w4a4"))
    }
    assert names == {
        "layers.0.q_proj": "w4a4",
        "layers.0.o_proj": "w4a4",
        "layers.0.head": "w8a16",
    }


def test_two_level_codes_take_plain_and_own_names():
    model = Model(q_proj=draw.make(SCHEMES["w4a8-qqq"], 32, 64, 32))
    for name, seen in [("w4a16", "w4a16-qqq"), ("w4a8-qqq", "w4a8-qqq"), ("w4a4", "w4a4-qqq")]:
        assert view.with_scheme(model, name).layers[0]["q_proj"].scheme.name == seen
    with pytest.raises(errors.ConfigError, match=r"'w4a8-qoq' cannot read .*q_proj is w4a8-qqq"):
        view.with_scheme(model, "w4a8-qoq")


def test_models_without_such_codes_are_refused(model):
    message = r"'w4a4' needs quantized weights and this model is dense.*experiments\.convert"
    with pytest.raises(errors.ConfigError, match=message):
        view.with_scheme(Model(gate=dense(8, 64)), "w4a4")
    message = r"'fp8' cannot read the codes.*q_proj is w4a16.*experiments\.convert --scheme=fp8"
    with pytest.raises(errors.ConfigError, match=message):
        view.with_scheme(Model(q_proj=model.layers[0]["q_proj"]), "fp8")
    with pytest.raises(errors.ConfigError, match="scheme='w5a5' is unknown"):
        view.with_scheme(model, "w5a5")


def test_with_backend(model):
    other = view.with_backend(model, "xla")
    assert {linear.backend for _, linear in view.quantized_linears(other)} == {"xla"}
    with pytest.raises(errors.SpecjaxError, match="backend='cuda' is unknown"):
        view.with_backend(model, "cuda")


@pytest.mark.parametrize("name", ["w4a16", "w4a16-asym", "w8a16", "fp4", "w4a16-qqq"])
def test_dequantized_computes_the_same(name):
    linear = draw.make(lookup(name), 24, 64, 32, perm=True, bias=True)
    x = rows(64)
    plain = view.dequantized(linear)
    assert isinstance(plain, Linear)
    np.testing.assert_allclose(plain(x), linear(x), rtol=1e-5, atol=1e-5)
    half = view.dequantized(linear, jnp.bfloat16)
    assert half.weight[...].dtype == half.bias[...].dtype == jnp.bfloat16
    with pytest.raises(errors.ConfigError, match=r"quantizes its inputs"):
        view.dequantized(draw.make(SCHEMES["w4a8"], 24, 64, 32))


@pytest.mark.parametrize("name", ["w4a8", "w4a8-asym", "w4a8-qqq", "w4a8-qoq", "w4a4", "w4a4-qoq"])
def test_expanded_computes_the_same_accumulators(name):
    linear = draw.make(lookup(name), 24, 64, 32, perm=True, bias=True)
    expanded = view.expanded(linear)
    assert expanded.codes.dtype == jnp.int8
    for found, wanted in zip(reference.runtime(expanded), reference.runtime(linear), strict=True):
        np.testing.assert_array_equal(found, wanted)
    x = rows(64)
    np.testing.assert_array_equal(expanded(x), linear(x))


def test_folded_scales_are_the_products_of_both_levels():
    linear = draw.make(lookup("w4a8-qqq"), 24, 256, 128, perm=True, bias=True)
    folded = view.folded(linear)
    assert (folded.scheme.name, folded.channel_scales) == ("w4a8", None)
    assert folded.codes is linear.codes
    product = linear.scales.astype(jnp.float32) * linear.channel_scales[:, None]
    np.testing.assert_array_equal(folded.scales, product.astype(jnp.float16))
    # An int8 weight is at most half a step of its channel from the code times its scale.
    gap = jnp.abs(folded.dequantize() - linear.dequantize())
    rounding = jnp.repeat(jnp.abs(product), 128, axis=1) * 8 * 2.0**-11
    assert (gap <= 0.5 * linear.channel_scales[:, None] + rounding).all()
    assert gap.max() > 0


def test_folded_leaves_others_alone_and_refuses_overflow():
    for name, group_size in [("w4a8", 32), ("w4a8-qoq", 32), ("w4a8-qqq", 64)]:
        linear = draw.make(lookup(name), 24, 64, group_size)
        assert view.folded(linear) is linear
    large = draw.make(lookup("w4a8-qqq"), 24, 256, 128)
    large = dataclasses.replace(large, channel_scales=jnp.full(24, 1e5))
    with pytest.raises(errors.ConfigError, match=r"beyond float16"):
        view.folded(large)


def test_expanded_leaves_others_alone():
    for name, minima in [("w4a16", False), ("w8a8", False), ("fp8", False), ("w4a8-asym", True)]:
        linear = draw.make(lookup(name), 24, 64, 64, minima=minima)
        assert view.expanded(linear) is linear


@pytest.mark.parametrize("name", ["w4a16-asym", "w8a8", "w4a8-qqq", "w4a8-qoq", "fp8", "fp4-a8"])
def test_fused_outputs_are_the_parts_in_order(name):
    parts = [draw.make(lookup(name), n, 64, 32, seed=n, bias=True) for n in (32, 16, 16)]
    fused, x = view.fuse(parts), rows(64)
    assert fused.out_features == 64
    wanted = np.concatenate([part(x) for part in parts], axis=-1)
    np.testing.assert_allclose(fused(x), wanted, rtol=1e-5, atol=1e-5)


def test_fused_permutations_are_shared():
    one, other = (draw.make(SCHEMES["w4a16"], 8, 64, 32, seed=n, perm=True) for n in (1, 2))
    assert view.fuse([one, one]).perm is one.perm
    assert view.fuse([one, other]) is None


def test_linears_that_differ_are_not_fused():
    base = draw.make(SCHEMES["w4a16"], 8, 64, 32)
    others = [
        draw.make(SCHEMES["w4a8"], 8, 64, 32),
        draw.make(SCHEMES["w4a16"], 8, 64, 64),
        draw.make(SCHEMES["w4a16"], 8, 32, 32),
        draw.make(SCHEMES["w4a16"], 8, 64, 32, bias=True),
        draw.make(SCHEMES["w4a16"], 8, 64, 32, scale_dtype=jnp.float32),
        base.with_backend("xla"),
        dense(8, 64),
    ]
    for other in others:
        assert view.fuse([base, other]) is None


def test_dense_linears_fuse():
    x = rows(64)
    for bias in (False, True):
        parts = [dense(n, 64, bias) for n in (8, 16)]
        wanted = np.concatenate([part(x) for part in parts], axis=-1)
        np.testing.assert_allclose(view.fuse(parts)(x), wanted, rtol=1e-5, atol=1e-5)
    assert view.fuse([dense(8, 64), dense(8, 64, bias=True)]) is None
    assert view.fuse([dense(8, 64), dense(8, 32)]) is None
