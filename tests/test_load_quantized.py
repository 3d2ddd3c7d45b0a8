"""Quantizing while loading: every quantization really rounds, and drafters take it as an option."""

import functools

import jax
import numpy as np
import pytest

import specjax
from experiments import bench_pairs
from specjax.drafters import registry
from specjax.errors import ConfigError
from specjax.quant import view
from specjax.quant.dense_linear import Linear
from specjax.quant.scheme import SCHEMES
from specjax.quantize import recipe
from tests import paths, tiny


@pytest.fixture(autouse=True)
def hurry(hurried):
    """What is computed matters here, to a few decimals."""


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
    layers = [linear for name, linear in linears if name != "lm_head"]
    assert len(layers) == 8, "two layers of four fused projections"
    assert all(linear.scheme == scheme for linear in layers)
    text = tiny.prompts()[0]
    expected, found = (tiny.full_logits(model(s).module, text) for s in (None, scheme.name))
    error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    print(f"{name}: relative RMS difference of the logits {error:.3g}")
    assert 1e-4 < error < 0.6


@pytest.mark.parametrize(
    "quantize, head_scheme, expected",
    [
        ("w8a8", "auto", "w8a8"),
        ("w4a8", "auto", "w8a8"),
        ("w8a16", "auto", None),
        ("w4a4", "auto", None),
        (None, "auto", None),
        ("w8a8", "dense", None),
        (None, "w8a16", "w8a16"),
    ],
)
def test_the_output_head_is_rounded_beside_integer_inputs_or_as_asked(
    quantize, head_scheme, expected
):
    found = specjax.load(
        paths.fixture("tiny-fp16"),
        dtype="float32",
        quantize=quantize,
        head_scheme=head_scheme,
        dequantize="never",
    )
    scheme = dict(view.quantized_linears(found.module)).get("lm_head")
    assert (None if scheme is None else scheme.scheme.name) == expected


def test_tied_heads_become_their_own_and_heads_take_8_bits_only():
    tied = specjax.load(
        paths.require("architectures/qwen3-tied"), dtype="float32", head_scheme="w8a8"
    )
    assert not tied.config.tie_word_embeddings and not tied.module.config.tie_word_embeddings
    plain = specjax.load(paths.require("architectures/qwen3-tied"), dtype="float32")
    text = [token % 256 for token in tiny.prompts()[0]]
    expected, found = (tiny.full_logits(m.module, text) for m in (plain, tied))
    error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    assert 1e-4 < error < 0.05
    with pytest.raises(ConfigError, match="head_scheme='w4a16': supported are dense, w8a16"):
        specjax.load(paths.require("architectures/qwen3-tied"), head_scheme="w4a16")


@pytest.mark.parametrize(
    "format", [pytest.param("specjax", marks=pytest.mark.slow), "compressed-tensors"]
)
def test_convert_writes_a_rounded_head(tmp_path, format):
    source = paths.require("architectures/qwen3-tied")
    specjax.convert(source, tmp_path / "a", format=format, scheme="w8a8", head_scheme="w8a8")
    stored = specjax.load(tmp_path / "a", dtype="float32", dequantize="never")
    head = dict(view.quantized_linears(stored.module))["lm_head"]
    assert head.scheme.name.startswith("w8a8")
    rounded = specjax.load(source, dtype="float32", quantize="w8a8", dequantize="never")
    text = [token % 256 for token in tiny.prompts()[0]]
    found, expected = (tiny.full_logits(m.module, text) for m in (stored, rounded))
    # compressed-tensors rounds inputs over the whole range of int8: a little elsewhere.
    error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    assert error < (1e-5 if format == "specjax" else 0.06)


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
