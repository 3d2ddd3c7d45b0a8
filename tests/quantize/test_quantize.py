"""Whole models: recipes, layer after layer, resumed after an interruption."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.errors import ConfigError
from specjax.models import llama
from specjax.quant import rotation
from specjax.quant.dense_linear import Linear
from specjax.quant.linear import QuantizedLinear
from specjax.quantize import layerwise, quantize, recipe, rotate
from specjax.quantize.workdir import WorkDir
from tests.quant import tiny_llama

TOKENS = tiny_llama.tokens(6, 24)
CHECK = jnp.asarray(tiny_llama.tokens(2, 24, seed=1))


def error(model, quantized):
    expected = llama.full_logits(model, CHECK)
    return tiny_llama.relative(llama.full_logits(quantized, CHECK), expected)


def codes(model):
    leaves = jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, QuantizedLinear))
    return [np.asarray(x.codes).view(np.uint8) for x in leaves if isinstance(x, QuantizedLinear)]


@pytest.mark.parametrize(
    ("scheme", "method", "group_size", "bound"),
    [
        pytest.param("w8a16", "rtn", -1, 0.02, marks=pytest.mark.slow),
        ("w8a8", "smoothquant", -1, 0.05),
        ("w4a16", "gptq", 32, 0.25),
        pytest.param("w4a8-qqq", "qqq", -1, 0.3, marks=pytest.mark.slow),
        pytest.param("w4a8-qoq", "qoq", 32, 0.25, marks=pytest.mark.slow),
        ("fp8", "rtn", -1, 0.1),
    ],
)
def test_quantized_models_stay_close(scheme, method, group_size, bound):
    model = tiny_llama.make()
    made = recipe.make(scheme, method, group_size=group_size)
    quantized = quantize.quantize(model, made, TOKENS)
    assert error(model, quantized) < bound
    assert len(codes(quantized)) == 14
    assert quantized.model.embed_tokens is model.model.embed_tokens
    names = {
        x.scheme.name for layer in quantized.model.layers for x in layerwise.linears(layer).values()
    }
    assert names == {scheme}


def test_gptq_beats_rounding_to_nearest():
    model = tiny_llama.make()

    def of(method):
        return error(
            model, quantize.quantize(model, recipe.make("w4a16", method, group_size=32), TOKENS)
        )

    assert of("gptq") < 0.8 * of("rtn")


def test_each_layer_is_calibrated_on_quantized_activations(monkeypatch):
    model = tiny_llama.make()
    seen = []
    original = layerwise.statistics
    monkeypatch.setattr(
        layerwise,
        "statistics",
        lambda layer, hidden, n: seen.append(hidden) or original(layer, hidden, n),
    )
    quantized = quantize.quantize(model, recipe.make("w4a4", "gptq"), TOKENS)
    after_first = layerwise.advance(quantized.model.layers[0], seen[0], 2)
    np.testing.assert_allclose(seen[1], after_first, rtol=1e-5, atol=1e-5)
    plain = layerwise.advance(model.model.layers[0], seen[0], 2)
    assert tiny_llama.relative(seen[1], plain) > 0.02


def test_rotations_at_run_time_stay_around_quantized_linears():
    model = tiny_llama.make()
    made = recipe.make("w4a4", "gptq")
    plain = quantize.quantize(model, made, TOKENS)
    rotated = rotate.rotate(model, rotation.random_hadamard(model.config, 0, online=True))
    quantized = quantize.quantize(rotated, made, TOKENS)
    inner = quantized.model.layers[1].mlp.down_proj
    assert isinstance(inner, rotation.RotatedInput) and isinstance(inner.linear, QuantizedLinear)
    assert error(model, quantized) < error(model, plain)


def test_biases_survive():
    model = tiny_llama.make(qkv_bias=True, o_bias=True, mlp_bias=True)
    quantized = quantize.quantize(model, recipe.make("w8a16", "rtn"))
    found = quantized.model.layers[0].self_attn.v_proj.bias
    np.testing.assert_array_equal(found, model.model.layers[0].self_attn.v_proj.bias[...])


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8-qoq", "fp4", "w8a8"])
def test_an_interrupted_run_resumes_to_the_same_codes(tmp_path, monkeypatch, scheme):
    model = tiny_llama.make(num_layers=3)
    method = "smoothquant" if scheme == "w8a8" else "gptq"
    made = recipe.make(scheme, method, group_size=-1 if scheme == "w8a8" else 32)
    whole = quantize.quantize(model, made, TOKENS)
    work = WorkDir.open(tmp_path / "work", {"run": 1})
    original, calls = layerwise.statistics, []

    def fails_at_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise Interrupted
        return original(*arguments)

    monkeypatch.setattr(layerwise, "statistics", fails_at_third)
    with pytest.raises(Interrupted):
        quantize.quantize(model, made, TOKENS, work=work)
    assert work.finished_layers() == 2
    reopened = WorkDir.open(tmp_path / "work", {"run": 1})
    resumed = quantize.quantize(model, made, TOKENS, work=reopened)
    assert len(calls) == 4  # the third layer alone
    for found, expected in zip(codes(resumed), codes(whole), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert error(whole, resumed) == 0
    assert WorkDir.open(tmp_path / "work", {"run": 2}).finished_layers() == 0


def test_model_refusals():
    model = tiny_llama.make()
    with pytest.raises(ConfigError, match="gptq needs calibration text: give calibration_file"):
        quantize.quantize(model, recipe.make("w4a16", "gptq", group_size=32))
    with pytest.raises(ConfigError, match=r"group_size=64 does not divide in_features=96.*32"):
        quantize.quantize(model, recipe.make("w4a16", "rtn", group_size=64))
    once = quantize.quantize(model, recipe.make("w8a16", "rtn"))
    with pytest.raises(ConfigError, match="q_proj is quantized already"):
        quantize.quantize(once, recipe.make("w8a16", "rtn"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("w4a16", "awq"), "method='awq' is unknown; supported: rtn, gptq, smoothquant, qqq, qoq"),
        (("w5a16", "rtn"), "scheme='w5a16' is unknown; known schemes: w8a16, w4a16"),
        (("w8a8", "qoq"), "method='qoq' needs scheme='w4a8-qoq'"),
        (("w4a16", "smoothquant"), "which scheme='w4a16' does not round"),
        (("w8a16", "qqq"), "method='qqq' eases the rounding of activations"),
    ],
)
def test_recipe_refusals(arguments, message):
    with pytest.raises(ConfigError) as raised:
        recipe.make(*arguments)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(symmetric=False), "symmetric=False is not supported with scheme='w8a8'"),
        (dict(strength=1.5), r"smooth_strength=1.5 is outside \[0, 1\]"),
        (dict(damping=0.0), r"damping=0.0 is outside \(0, 1\)"),
        (dict(group_size=0), "group_size=0: expected a positive number, or -1"),
    ],
)
def test_setting_refusals(settings, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        recipe.make("w8a8", "smoothquant", **settings)


def test_a_strength_needs_a_method_that_smooths():
    with pytest.raises(ConfigError, match="does not smooth; use smoothquant, qqq, qoq"):
        recipe.make("w4a8", "gptq", strength=0.5)


def test_recipe_defaults():
    assert recipe.make("w4a16", "gptq").group_size == 128
    assert recipe.make("w4a8-qqq", "gptq").group_size == -1
    assert recipe.make("w4a16", "gptq", symmetric=False).scheme.name == "w4a16-asym"
    assert recipe.make("w8a8", "rtn").clip is None and recipe.make("w4a16", "rtn").clip is not None
    assert not recipe.make("w8a8", "rtn").needs_calibration
    qoq = recipe.make("w4a8-qoq", "qoq", group_size=-1)
    assert (qoq.rounding, qoq.smooth, qoq.strength) == ("gptq", True, 0.1)
    assert dataclasses.replace(qoq, smooth=False).needs_calibration
    qqq = recipe.make("w4a8-qqq", "qqq")
    assert (qqq.rounding, qqq.smooth, qqq.smooth_outputs, qqq.strength) == (
        "gptq",
        True,
        True,
        None,
    )


def test_linears_of_a_fused_layer_are_refused():
    layer = tiny_llama.make().model.layers[0]
    layer.self_attn.q_proj = None
    with pytest.raises(ConfigError, match="quantize it before `prepare`"):
        layerwise.linears(layer)
    assert isinstance(layer.mlp.up_proj, Linear)
