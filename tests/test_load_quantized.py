"""Quantizing while loading: every quantization really rounds, and drafters take it as an option."""

import functools

import jax
import numpy as np
import pytest

import specjax
from experiments import bench_pairs
from specjax.drafters import registry
from specjax.quant import view
from specjax.quant.dense_linear import Linear
from specjax.quant.scheme import SCHEMES
from specjax.quantize import recipe
from tests import paths, tiny


@functools.cache
def model(quantize: str | None = None):
    return specjax.load(
        paths.fixture("tiny-fp16"), dtype="float32", quantize=quantize, dequantize="never"
    )


@pytest.mark.parametrize(
    "name", [name for name, scheme in bench_pairs.QUANTIZATIONS.items() if scheme]
)
def test_every_quantization_stores_codes_and_changes_the_model(name):
    scheme = SCHEMES[bench_pairs.QUANTIZATIONS[name]]
    linears = view.quantized_linears(model(scheme.name).module)
    assert len(linears) == 8, "two layers of four fused projections"
    assert all(linear.scheme == scheme for _, linear in linears)
    text = tiny.prompts()[0]
    expected, found = (tiny.full_logits(model(s).module, text) for s in (None, scheme.name))
    error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    print(f"{name}: relative RMS difference of the logits {error:.3g}")
    assert 1e-4 < error < 0.6


def test_groups_follow_the_widths():
    assert recipe.at_load("w4a16", model().config).group_size == 128
    assert recipe.at_load("w4a16", tiny.config(hidden_size=576, num_heads=9)).group_size == -1
    widths = dict(hidden_size=576, num_heads=9, head_dim=64, intermediate_size=1536)
    assert recipe.at_load("w4a16", tiny.config(**widths)).group_size == 64
    assert recipe.at_load("w8a8", model().config).group_size == -1


def test_two_levels_of_scales_fold_while_loading():
    folded = specjax.load(paths.fixture("tiny-qqq-g128"), dtype="float32", dequantize="fold")
    linears = view.quantized_linears(folded.module)
    assert {linear.scheme.name for _, linear in linears} == {"w4a8"}
    text = tiny.prompts()[0]
    exact = tiny.full_logits(tiny.fixture_model("tiny-qqq-g128"), text)
    found = tiny.full_logits(folded.module, text)
    error = np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2))
    assert 0 < error < 0.02


def test_quantized_checkpoints_are_decoded_first():
    found = specjax.load(
        paths.fixture("tiny-gptq-g128"), dtype="float32", quantize="w8a16", dequantize="never"
    )
    assert {linear.scheme.name for _, linear in view.quantized_linears(found.module)} == {"w8a16"}
    text = tiny.prompts()[0]
    codes = tiny.full_logits(tiny.fixture_model("tiny-gptq-g128"), text)
    error = np.sqrt(
        np.mean((tiny.full_logits(found.module, text) - codes) ** 2) / np.mean(codes**2)
    )
    assert 0 < error < 0.05


@pytest.mark.parametrize("kind", ["lm", "hierarchical"])
def test_drafters_quantize_their_model(kind):
    spec = {"kind": kind, "model": str(paths.fixture("tiny-fp16")), "quantize": "w8a8"}
    if kind == "hierarchical":
        spec["inner"] = {"kind": "ngram"}
    drafter = registry.build(spec, model())
    linears = view.quantized_linears(drafter.model)
    assert linears and all(linear.scheme.name == "w8a8" for _, linear in linears)
    is_linear = lambda node: isinstance(node, Linear)
    layers = jax.tree.leaves(drafter.model.model.layers, is_leaf=is_linear)
    assert not any(map(is_linear, layers))
