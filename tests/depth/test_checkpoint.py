"""Routed models on disk: what is written is what was trained, and it loads again."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax import checkpoints
from specjax.checkpoints import export
from specjax.config.depth import DepthConfig
from specjax.depth import checkpoint
from specjax.errors import CheckpointError, ConfigError
from specjax.models import llama
from specjax.training.depth import adapter as adapters
from specjax.training.depth import masked
from tests import tiny

pytestmark = pytest.mark.usefixtures("hurried")

CONFIG = DepthConfig(start_layer=1, reserved_tokens=2, router_width=24, code_bits=4)


def trained(seed=0):
    """(base, adapter): updates that are not zero, routers that often skip."""
    base = tiny.model(tiny.config(num_layers=3))
    adapter = adapters.init(jax.random.key(seed), base.config, CONFIG, rank=2)
    keys = iter(jax.random.split(jax.random.key(seed + 1), 30))
    for layer in adapter.layers:
        for name in adapters.PROJECTIONS:
            lora = getattr(layer, name)
            lora.b[...] = 0.3 * jax.random.normal(next(keys), lora.b.shape)
    for router in adapter.routers:
        # Codes have a large common part, which would make all tokens decide alike.
        up = jax.random.normal(next(keys), router.up_proj.weight.shape)
        router.up_proj.weight[...] = up - up.mean(axis=1, keepdims=True)
        router.norm.weight[...] = 1 + jax.random.uniform(next(keys), router.norm.weight.shape)
        router.down_proj.weight[...] = jax.random.normal(next(keys), router.down_proj.weight.shape)
        router.down_proj.bias[...] = jnp.array([0.1, 0.2])
    return base, adapter


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a routed model in float32, with (base, adapter)."""
    base, adapter = trained()
    path = tmp_path_factory.mktemp("routed") / "model"
    module = adapters.routed(base, adapter)
    export.export(module, module.config, path, format="dense", source="tiny")
    return path, base, adapter


def test_config_names_and_manifest(written):
    path, _, _ = written
    config = json.loads((path / "config.json").read_text())
    assert {key: value for key, value in config.items() if key.startswith("dynamic_")} == {
        "dynamic_start_layer": 1,
        "dynamic_reserve_initials": 2,
        "dynamic_router_hdim": 24,
        "dynamic_active_target": 0.5,
        "dynamic_router_bits": 4,
    }
    opened = checkpoints.open_checkpoint(path)
    assert opened.config.depth == CONFIG
    names = {name for name in opened.source.names() if ".router." in name}
    assert names == {
        f"model.layers.{i}.router.{leaf}"
        for i in (1, 2)
        for leaf in (
            *("up_proj.weight", "up_proj.bias", "norm.weight"),
            *("down_proj.weight", "down_proj.bias"),
        )
    }
    assert json.loads((path / "specjax.json").read_text())["files"].keys() >= {"model.safetensors"}


def test_routers_come_back_bit_for_bit(written):
    path, _, adapter = written
    again = checkpoint.routers_from(checkpoints.open_checkpoint(path), CONFIG)
    stored = checkpoint.tensors(adapter.routers, CONFIG)
    for name, array in checkpoint.tensors(again, CONFIG).items():
        np.testing.assert_array_equal(array, stored[name])
    x = jax.random.normal(jax.random.key(3), (5, 32))
    for one, other in zip(adapter.routers, again, strict=True):
        np.testing.assert_array_equal(one(x), other(x))


def test_logits_are_the_same_before_and_after_merge_and_export(written):
    path, base, adapter = written
    tokens = jax.random.randint(jax.random.key(9), (2, 12), 0, 16)
    before = jax.jit(masked.forward)(base, adapter, tokens)
    assert 0.2 < float(before.executed[:, 2:, 1:].mean()) < 0.9
    loaded = specjax.load(path, dtype="float32")
    found = jax.jit(llama.full_logits)(loaded.module, tokens)
    np.testing.assert_allclose(found, base.logits(before.hidden), rtol=0, atol=1e-4)
    full = specjax.load(path, dtype="float32", depth="full")
    everything = jax.jit(llama.full_logits)(full.module, tokens)
    merged = jax.jit(llama.full_logits)(adapters.merge(base, adapter.layers), tokens)
    np.testing.assert_allclose(everything, merged, rtol=0, atol=1e-4)
    assert np.abs(np.asarray(everything - found)).max() > 0.1


@pytest.mark.parametrize(("format", "dtype"), [("dense", "bfloat16"), ("specjax", "float16")])
def test_routers_stay_in_float32_in_every_format(format, dtype, written, tmp_path):
    _, base, adapter = written
    module = adapters.routed(base, adapter)
    if format == "specjax":
        from specjax.quantize import quantize, recipe

        module = quantize.quantize(module, recipe.make("w8a16", "rtn"))
    export.export(module, module.config, tmp_path / "m", format=format, dtype=dtype)
    opened = checkpoints.open_checkpoint(tmp_path / "m")
    again = checkpoint.tensors(checkpoint.routers_from(opened, CONFIG), CONFIG)
    for name, array in checkpoint.tensors(adapter.routers, CONFIG).items():
        assert opened.source.dtype(name) == np.float32
        np.testing.assert_array_equal(array, again[name])


def test_what_is_missing_is_named(written, tmp_path):
    path, _, _ = written
    opened = checkpoints.open_checkpoint(path)
    earlier = dataclasses.replace(CONFIG, start_layer=0)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.router\.up_proj\.weight"):
        checkpoint.routers_from(opened, earlier)
    wider = dataclasses.replace(CONFIG, router_width=25)
    with pytest.raises(CheckpointError, match=r"shape \[24, 32\].*\[25, 32\]"):
        checkpoint.routers_from(opened, wider)
    with pytest.raises(ConfigError, match="dynamic_start_layer=3: the model has 3 layers"):
        checkpoint.routers_from(opened, dataclasses.replace(CONFIG, start_layer=3))
