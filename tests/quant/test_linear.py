"""The canonical form: its meaning in floats, its checks, and its life as a pytree inside nnx
modules.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from specjax import errors
from specjax.quant.linear import QuantizedLinear
from specjax.quant.scheme import SCHEMES, lookup
from tests.quant import random_linears as draw

NAMES = [*SCHEMES, "w8a16-asym", "w4a16-qqq", "w4a16-qoq"]


class Pair(nnx.Module):
    """Two quantized linears and a dense parameter, as a model holds them."""

    def __init__(self, first: QuantizedLinear, second: QuantizedLinear):
        self.first = first
        self.layers = nnx.List([second])
        self.norm = nnx.Param(jnp.ones(4))

    def __call__(self, x):
        return self.layers[0](self.first(x))


@pytest.fixture
def pair():
    first = draw.make(SCHEMES["w4a16"], 192, 64, 32, perm=True, bias=True)
    return Pair(first, draw.make(SCHEMES["w4a8-qoq"], 32, 192, 64))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("perm", [False, True])
def test_dequantize_is_the_formula(name, perm):
    linear = draw.make(lookup(name), 24, 192, 64, perm=perm)
    found, wanted = linear.dequantize(), draw.dense_weight(linear)
    assert (linear.out_features, linear.in_features) == found.shape == (24, 192)
    np.testing.assert_allclose(found, wanted, rtol=2e-7)
    half = linear.dequantize(jnp.bfloat16)
    np.testing.assert_array_equal(half, found.astype(jnp.bfloat16))


@pytest.mark.parametrize("group_size", [64, 192])
def test_dequantize_with_minima(group_size):
    linear = draw.make(SCHEMES["w4a16-asym"], 24, 192, group_size, minima=True)
    np.testing.assert_allclose(linear.dequantize(), draw.dense_weight(linear), atol=1e-7)


def test_modules_with_linears_compile_and_round_trip(pair):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32))
    plain, compiled = pair(x), jax.jit(lambda module, x: module(x))(pair, x)
    np.testing.assert_allclose(plain, compiled, rtol=1e-5, atol=1e-5)
    leaves, treedef = jax.tree.flatten(pair)
    rebuilt = jax.tree.unflatten(treedef, leaves)
    assert rebuilt.first.scheme == pair.first.scheme
    assert rebuilt.first.codes is pair.first.codes
    paths_found = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(pair)]
    assert ".first.codes" in paths_found
    assert ".layers[0].channel_scales" in paths_found


def test_nnx_sees_the_arrays(pair):
    graph, state = nnx.split(pair)
    merged = nnx.merge(graph, state)
    np.testing.assert_array_equal(merged.first.scales, pair.first.scales)
    assert merged.layers[0].group_size == 64


def test_transformations_may_put_anything_in_the_leaves(pair):
    shapes = jax.tree.map(lambda leaf: leaf.shape, pair)
    assert shapes.first.codes == (192, 64)
    abstract = jax.eval_shape(lambda module: module, pair)
    assert abstract.layers[0].codes.dtype == jnp.uint4
    assert jax.tree.map(lambda _: None, pair).first.scheme == pair.first.scheme


def test_a_scheme_is_static(pair):
    traces = []

    @jax.jit
    def run(linear, x):
        traces.append(linear.scheme.name)
        return linear(x)

    x = jnp.ones((2, 64))
    for scheme in ("w4a16", "w4a8", "w4a16"):
        run(pair.first.with_activations(SCHEMES[scheme].activations), x)
    assert traces == ["w4a16", "w4a8"]


def test_views_share_arrays():
    linear = draw.make(SCHEMES["w4a16"], 32, 64, 32, perm=True, bias=True)
    view = linear.with_activations(SCHEMES["w4a4"].activations).with_backend("xla")
    assert (view.scheme.name, view.backend) == ("w4a4", "xla")
    for field in dataclasses.fields(linear):
        if field.name not in ("scheme", "backend"):
            assert getattr(view, field.name) is getattr(linear, field.name)
    with pytest.raises(errors.ConfigError, match="cannot be multiplied by activations"):
        linear.with_activations(SCHEMES["fp8"].activations)


def test_an_explicit_backend_that_does_not_exist_is_refused():
    linear = draw.make(SCHEMES["w4a16"], 32, 64, 32).with_backend("mosaic")
    with pytest.raises(errors.SpecjaxError, match=r"matmul_w4a16 cannot run.*no NVIDIA GPU"):
        linear(jnp.ones((1, 64)))


def changed(linear, **parts):
    return dataclasses.replace(linear, **parts)


def test_the_constructor_names_the_part_that_does_not_fit():
    sym, asym = (draw.make(SCHEMES[n], 32, 64, 32) for n in ("w4a16", "w4a16-asym"))
    qqq = draw.make(SCHEMES["w4a8-qqq"], 32, 64, 32)
    cases = [
        (sym, dict(scales=sym.scales[:, :1]), r"scales has shape \(32, 1\), expected \(32, 2\)"),
        (sym, dict(bias=jnp.zeros(3)), r"bias has shape \(3,\), expected \(32,\)"),
        (sym, dict(perm=jnp.zeros(3, jnp.int32)), r"perm has shape \(3,\), expected \(64,\)"),
        (sym, dict(codes=asym.codes), "codes of scheme w4a16 are int4, found uint4"),
        (sym, dict(zeros=asym.zeros), "w4a16 takes neither of zeros and minima, found zeros"),
        (asym, dict(zeros=None), "w4a16-asym takes exactly one of .*found none"),
        (asym, dict(minima=asym.scales), "w4a16-asym takes exactly one .*found zeros, minima"),
        (sym, dict(channel_scales=jnp.ones(32)), "w4a16 .*takes no channel_scales"),
        (qqq, dict(channel_scales=None), "w4a8-qqq with group_size=32 needs channel_scales"),
        (sym, dict(group_size=48), "group_size=48 does not divide in_features=64"),
        (sym, dict(group_size=-1), "group_size=-1 is written as in_features=64"),
    ]
    for linear, parts, message in cases:
        with pytest.raises(errors.ConfigError, match=message):
            changed(linear, **parts)


def test_values_that_would_poison_the_model_are_named():
    linear = draw.make(SCHEMES["w4a16"], 32, 64, 32, perm=True)
    assert linear.checked("q_proj") is linear
    broken = changed(linear, scales=linear.scales.at[3, 1].set(jnp.nan))
    with pytest.raises(errors.CheckpointError, match="q_proj: 1 of 64 scales are NaN or infinite"):
        broken.checked("q_proj")
    twice = changed(linear, perm=linear.perm.at[0].set(linear.perm[1]))
    with pytest.raises(errors.CheckpointError, match="q_proj: perm is not a permutation"):
        twice.checked("q_proj")
