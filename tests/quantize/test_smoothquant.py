"""Smoothing changes no function, eases the rounding of activations, and picks strengths
sensibly.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from specjax.quant import activations, rotation, scheme
from specjax.quant.scheme import ActivationSpec
from specjax.quantize import layerwise, rotate, rtn, smoothquant
from tests.quant import tiny_llama

W8A8 = scheme.lookup("w8a8")
OUTLIER = 5


def observed(**changes):
    """A layer whose attention input has one strong feature, its inputs, and what its sites see."""
    model = tiny_llama.make(**changes)
    layer = model.model.layers[0]
    gain = layer.input_layernorm.weight[...].at[OUTLIER].set(60.0)
    layer.input_layernorm.weight.set_value(gain)
    hidden = layerwise.embed(model, tiny_llama.tokens(4, 24))
    return layer, hidden, layerwise.statistics(layer, hidden, 2)


BIASED = dict(qkv_bias=True, o_bias=True, mlp_bias=True)


@pytest.mark.parametrize("changes", [{}, BIASED], ids=["plain", "biased"])
@pytest.mark.parametrize(("strength", "outputs"), [(0.5, False), (0.85, True), (None, True)])
def test_the_function_stays(changes, strength, outputs):
    layer, hidden, seen = observed(**changes)
    smoothed, predicted = smoothquant.smooth(layer, seen, W8A8, -1, strength, outputs)
    expected = layerwise.advance(layer, hidden, 4)
    found = layerwise.advance(smoothed, hidden, 4)
    assert tiny_llama.relative(found, expected) < 1e-5
    # What its sites see is known without running it.
    measured = layerwise.statistics(smoothed, hidden, 4)
    for site, statistics in measured.items():
        np.testing.assert_allclose(predicted[site].amax, statistics.amax, rtol=1e-3)
        scale = float(jnp.max(jnp.abs(statistics.gram)))
        np.testing.assert_allclose(predicted[site].gram, statistics.gram, atol=1e-4 * scale)


def test_outliers_move_into_weights():
    layer, _, seen = observed()
    smoothed, after = smoothquant.smooth(layer, seen, W8A8, -1, 0.5)

    def peak(amax):
        return float(jnp.max(amax) / jnp.median(amax))

    assert peak(after["qkv"].amax) < 0.4 * peak(seen["qkv"].amax)
    before = layer.self_attn.q_proj.weight[...][:, OUTLIER]
    column = smoothed.self_attn.q_proj.weight[...][:, OUTLIER]
    assert float(jnp.max(jnp.abs(column))) > 2 * float(jnp.max(jnp.abs(before)))


@pytest.mark.parametrize("bits", [8, 4])
def test_the_searched_strength_is_no_worse_than_any_other(bits):
    _, _, seen = observed()
    layer = observed()[0]
    weights = [getattr(layer.self_attn, n).weight[...] for n in ("q_proj", "k_proj", "v_proj")]
    weight = jnp.concatenate(weights)
    spec = scheme.Scheme(weights=W8A8.weights, activations=ActivationSpec(bits=bits))
    best = smoothquant.best_strength(weights, seen["qkv"], spec, -1)

    def error(strength):
        amax = jnp.max(jnp.abs(weight), axis=0)
        s = jnp.ones_like(amax)
        if strength is not None:
            s = smoothquant.factors(seen["qkv"].amax, amax, strength)
        quantized = activations.quantize(seen["qkv"].rows / s, spec.activations)
        x = quantized.codes.astype(jnp.float32) * quantized.scale
        rounded = rtn.quantize(weight * s, spec).dequantize()
        exact = seen["qkv"].rows @ weight.T
        rows = jnp.mean((x @ rounded.T - exact) ** 2, axis=1) / jnp.mean(exact**2, axis=1)
        return float(jnp.mean(rows))

    assert best is not None
    assert error(best) < 0.9 * error(None)
    assert error(best) < 1.001 * min(error(s) for s in smoothquant.STRENGTHS)


def test_features_that_are_never_active_keep_their_scale():
    s = smoothquant.factors(jnp.array([0.0, 4.0, 1.0]), jnp.array([1.0, 1.0, 0.0]), 0.5)
    np.testing.assert_allclose(s, [1, 2, 1])


def test_inputs_that_are_rotated_at_run_time_are_left_alone():
    model = tiny_llama.make()
    model = rotate.rotate(model, rotation.random_hadamard(model.config, 0, online=True))
    layer = model.model.layers[0]
    seen = layerwise.statistics(layer, layerwise.embed(model, tiny_llama.tokens(2, 8)), 2)
    smoothed, _ = smoothquant.smooth(layer, seen, W8A8, -1, 0.5, outputs=True)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        before, after = (layerwise.linears(x)[name] for x in (layer, smoothed))
        np.testing.assert_array_equal(before.weight[...], after.weight[...])
