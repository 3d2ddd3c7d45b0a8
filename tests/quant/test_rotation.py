"""Hadamard matrices of every order that is needed; rotated models compute the same function."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from specjax import checkpoints
from specjax.errors import CheckpointError, ConfigError
from specjax.models import llama
from specjax.quant import hadamard, rotation, scheme, view
from specjax.quant.linear import QuantizedLinear
from specjax.quant.rotation import RotatedInput
from specjax.quantize import rotate, rtn
from tests import derived, paths
from tests.quant import tiny_llama

# Those of QuaRot, and the widths of real models: SmolLM2, Llama-2 and 3, Qwen2.
ORDERS = [
    *(1, 2, 4, 8, 12, 20, 28, 36, 40, 52, 60, 64, 108, 140, 148, 156, 172),
    *(192, 576, 896, 960, 1536),
]


@pytest.mark.parametrize("order", ORDERS)
def test_hadamard_matrices_are_orthogonal(order):
    matrix = hadamard.hadamard(order)
    assert set(np.unique(matrix)) <= {-1, 1}
    wide = matrix.astype(np.float32)  # exact: sums of at most 1536 units
    np.testing.assert_array_equal(wide @ wide.T, order * np.eye(order))


@pytest.mark.parametrize("order", [5120, 8192, 11008, 13824, 14336, 18944, 28672])
def test_large_orders_are_products_of_small_factors(order):
    left, right = hadamard.factors(order)
    assert len(left) * len(right) == order and max(len(left), len(right)) <= 4096
    for factor in (left, right):
        wide = factor.astype(np.float32)
        np.testing.assert_array_equal(wide @ wide.T, len(factor) * np.eye(len(factor)))


@pytest.mark.parametrize("order", [3, 9, 18, 92, 0])
def test_orders_without_a_construction_are_none(order):
    assert hadamard.factors(order) is None


@pytest.mark.parametrize("order", [9, 18, 12, 92, 15, 1])
def test_orthogonal_factors_exist_for_every_order(order):
    left, right = hadamard.orthogonal_factors(order, np.random.default_rng(0))
    matrix = np.kron(left, right)
    assert len(matrix) == order
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(order), atol=1e-12)


SHAPES = {
    "tied": {},
    "untied": dict(tie_word_embeddings=False),
    "biased": dict(qkv_bias=True, o_bias=True, mlp_bias=True),
    # As SmolLM2: 9 heads, and widths that are no powers of two.
    "nine heads": dict(
        hidden_size=36, num_heads=9, num_kv_heads=3, head_dim=4, intermediate_size=52
    ),
}


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_rotated_model_computes_the_same(shape, online):
    model = tiny_llama.make(**SHAPES[shape])
    tokens = jnp.asarray(tiny_llama.tokens(2, 12))
    made = rotation.random_hadamard(model.config, 0, online)
    rotated = rotate.rotate(model, made)
    found, expected = (llama.full_logits(m, tokens) for m in (rotated, model))
    assert tiny_llama.relative(found, expected) < 1e-5
    assert not rotated.config.tie_word_embeddings and rotated.lm_head is not None
    assert np.all(np.asarray(rotated.model.norm.weight[...]) == 1)
    assert isinstance(rotated.model.layers[0].mlp.down_proj, RotatedInput) == online


def test_rotation_spreads_outlier_features():
    model = tiny_llama.make()
    tokens = jnp.asarray(tiny_llama.tokens(1, 16))
    rotated = rotate.rotate(model, rotation.random_hadamard(model.config, 0))

    def peak(x):
        return float(jnp.max(jnp.abs(x)) / jnp.sqrt(jnp.mean(x**2)))

    plain = model.model.layers[0].input_layernorm(model.model.embed_tokens(tokens))
    mixed = rotated.model.layers[0].input_layernorm(rotated.model.embed_tokens(tokens))
    assert peak(mixed) < 0.6 * peak(plain)


def test_golden_rotation():
    """tiny-fp16 under the Q of rotation-tiny: the logits and the weights of the tool that made
    it.
    """
    golden = load_file(paths.golden("rotation-tiny.safetensors"))
    model = llama.build(checkpoints.open_checkpoint(paths.fixture("tiny-fp16")), jnp.float32)
    folder = paths.fixture("rotation-tiny")
    made = rotation.load(rotation.find(folder))
    np.testing.assert_array_equal(
        made.residual, derived.tensors_of(folder, "rotation.pth")["tensor"]
    )
    made = dataclasses.replace(made, head=hadamard.sylvester(64) / 8)
    rotated = rotate.rotate(model, made)
    logits = llama.full_logits(rotated, jnp.asarray(golden["input_ids"]))
    np.testing.assert_allclose(logits, golden["logits_unrotated"], atol=1e-4)
    stored = llama.build(checkpoints.open_checkpoint(folder), jnp.float32)
    for name in ("v_proj", "o_proj"):
        found, expected = (getattr(m.model.layers[1].self_attn, name) for m in (rotated, stored))
        np.testing.assert_allclose(found.weight[...], expected.weight[...], atol=5e-4)


def test_rotated_input_is_a_linear_over_plain_inputs():
    generator = np.random.default_rng(0)
    left, right = hadamard.orthogonal_factors(24, generator)
    weight = jnp.asarray(generator.standard_normal((8, 24)), jnp.float32)
    x = jnp.asarray(generator.standard_normal((3, 24)), jnp.float32)
    arrays = dict(left=jnp.asarray(left, jnp.float32), right=jnp.asarray(right, jnp.float32))
    expected = np.kron(left, right)
    plain = RotatedInput(linear=None, **arrays)
    np.testing.assert_allclose(plain.rotate(x), np.asarray(x) @ expected, atol=1e-5)
    inner = rtn.quantize(plain.rotate(weight), scheme.lookup("w8a16"))
    wrapped = plain.with_linear(inner)
    np.testing.assert_allclose(wrapped.dequantize(), weight, atol=0.02)
    np.testing.assert_allclose(wrapped(x), x @ wrapped.dequantize().T, atol=1e-4)
    assert (wrapped.out_features, wrapped.in_features) == (8, 24)


def test_views_reach_through_a_rotated_input():
    linear = rtn.quantize(jnp.ones((4, 8)), scheme.lookup("w4a4"))
    wrapped = RotatedInput(linear=linear, left=jnp.eye(2))
    viewed = view.with_scheme(wrapped, "w4a16")
    assert isinstance(viewed.linear, QuantizedLinear) and viewed.linear.scheme.activations is None
    assert viewed.linear.codes is linear.codes


def test_files_round_trip(tmp_path):
    config = tiny_llama.make_config(num_heads=9, num_kv_heads=3, hidden_size=36, head_dim=4)
    made = rotation.random_hadamard(config, 1, online=True)
    made = dataclasses.replace(made, norm_gain=np.ones(36))
    rotation.save(made, tmp_path)
    found = rotation.load(rotation.find(tmp_path))
    assert found.id == made.id and found.online
    np.testing.assert_array_equal(found.heads, made.heads)
    np.testing.assert_array_equal(found.ffn[1], made.ffn[1])
    assert (
        rotation.random_hadamard(config, 2).id != made.id == rotation.random_hadamard(config, 1).id
    )


def test_refusals(tmp_path):
    model = tiny_llama.make()
    other = rotation.random_hadamard(tiny_llama.make_config(hidden_size=32, head_dim=8), 0)
    with pytest.raises(ConfigError, match="order 32, the model's hidden_size is 64"):
        rotate.rotate(model, other)
    narrow = rotation.random_hadamard(tiny_llama.make_config(head_dim=8), 0)
    with pytest.raises(ConfigError, match="heads is of order 8, the model's head_dim is 16"):
        rotate.rotate(model, narrow)
    quantized = rtn.quantize(
        model.model.layers[0].self_attn.q_proj.weight[...], scheme.lookup("w8a8")
    )
    model.model.layers[0].self_attn.q_proj = quantized
    with pytest.raises(ConfigError, match="rotate before quantizing"):
        rotate.rotate(model, rotation.random_hadamard(model.config, 0))
    with pytest.raises(FileNotFoundError, match="no such file"):
        rotation.load(tmp_path / "rotation.safetensors")
    rotation.save(rotation.Rotation(residual=np.ones((4, 4))), tmp_path)
    with pytest.raises(CheckpointError, match="not an orthogonal matrix"):
        rotation.load(tmp_path / "rotation.safetensors")
