"""What is stored decides, and settings with two homes are read once: cases 01, 03 and 06 and what is like them."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from specjax import checkpoints
from specjax.checkpoints import export
from specjax.config import ModelConfig
from specjax.errors import CheckpointError, ConfigError
from specjax.models import llama
from tests import paths
from tests.checkpoints.folders import read_all
from tests.checkpoints.test_hf import CONFIG, folder, tensors

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def opened(path):
    return checkpoints.open_checkpoint(path)


def said(caplog, *words) -> bool:
    return any(all(word in record.getMessage() for word in words) for record in caplog.records)


def test_tied_configuration_with_another_head_loads_the_head(tmp_path, caplog):
    path = folder(tmp_path, tie_word_embeddings=True)
    model = llama.build(opened(path), jnp.float32)
    np.testing.assert_array_equal(model.lm_head.weight[...], tensors()["lm_head.weight"])
    assert said(caplog, "tie_word_embeddings", "lm_head")


def test_tied_configuration_with_the_same_head_is_tied(tmp_path, caplog):
    weights = tensors()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    assert opened(folder(tmp_path, weights, tie_word_embeddings=True)).config.tie_word_embeddings
    assert not caplog.records


@pytest.mark.parametrize("head", ["lm_head.weight", "language_model.lm_head.weight"])
def test_a_head_beside_the_language_model_or_in_it(tmp_path, head):
    weights = {f"language_model.{name}": value for name, value in tensors().items()}
    weights[head] = weights.pop("language_model.lm_head.weight")
    model = llama.build(opened(folder(tmp_path, weights, tie_word_embeddings=True)), jnp.float32)
    np.testing.assert_array_equal(model.lm_head.weight[...], weights[head])


def test_no_head_stored(tmp_path, caplog):
    weights = tensors()
    del weights["lm_head.weight"]
    assert opened(folder(tmp_path, weights)).config.tie_word_embeddings
    assert said(caplog, "lm_head.weight is stored")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing .* = false"):
        opened(folder(tmp_path, weights, tie_word_embeddings=False))


def indexed(tmp_path, absent, **fields):
    """A folder whose index puts one more tensor in a shard that is not there."""
    weights = tensors()
    weights.pop(absent, None)
    path = folder(tmp_path, weights, **fields)
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    shards = dict.fromkeys(weights, "model-00001-of-00002.safetensors")
    shards[absent] = "model-00002-of-00002.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return path


@pytest.mark.parametrize(
    "absent", ["lm_head.weight", "model.layers.0.self_attn.q_proj.bias", "model.norm.weight"]
)
def test_a_shard_that_holds_a_part_of_the_model_is_missing(tmp_path, absent):
    """Nothing else may stand in for it: neither the embedding for the head, nor nothing for a bias."""
    path = indexed(tmp_path, absent)
    with pytest.raises(CheckpointError, match=rf"shard model-00002\S* is missing: .* {absent}"):
        opened(path)


def test_a_missing_shard_that_nobody_needs_is_no_loss(tmp_path, caplog):
    (tmp_path / "tied").mkdir()
    llama.build(opened(indexed(tmp_path, "model.layers.7.mtp.weight")), jnp.float32)
    assert said(caplog, "1 tensors that no file holds", "mtp")
    tied = indexed(tmp_path / "tied", "lm_head.weight", tie_word_embeddings=True)
    assert opened(tied).config.tie_word_embeddings


@pytest.mark.parametrize(
    ("stored", "config", "expected"),
    [
        (QKV[:1], {}, ("q_proj",)),
        ((*QKV, "mlp.down_proj"), {}, ("q_proj", "k_proj", "v_proj", "down_proj")),
        (QKV, {"attention_bias": True}, ("q_proj", "k_proj", "v_proj")),
        ((), {"mlp_bias": True}, ()),
    ],
)
def test_stored_biases_are_loaded(tmp_path, caplog, stored, config, expected):
    path = folder(tmp_path, tensors(biases=stored), **config)
    checkpoint = opened(path)
    assert said(caplog, "biases")
    layer = llama.build_layer(checkpoint, 0, jnp.float32)
    for part in (layer.self_attn, layer.mlp):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            if hasattr(part, name):
                assert (getattr(part, name).bias is not None) == (name in expected), name
    model = llama.build(checkpoint, jnp.float32)
    export.export(model, checkpoint.config, tmp_path / "out", format="dense")
    again = read_all(tmp_path / "out" / "model.safetensors")
    assert set(again) == set(tensors(biases=stored))


def test_a_bias_that_some_layers_lack_is_named(tmp_path):
    weights = tensors(biases=QKV)
    weights |= {name.replace("layers.0.", "layers.1."): value for name, value in weights.items()}
    del weights["model.layers.1.self_attn.k_proj.bias"]
    path = folder(tmp_path, weights, architectures=["Qwen2ForCausalLM"], num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_proj\.bias is missing"):
        opened(path)


def test_norms_and_layers_that_the_architecture_has_not_are_named(tmp_path):
    weights = tensors() | {"model.layers.0.self_attn.q_norm.weight": np.ones(4, np.float32)}
    with pytest.raises(CheckpointError, match=r"self_attn\.q_norm\.weight .* has no place"):
        opened(folder(tmp_path, weights))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def config(**fields) -> ModelConfig:
    return ModelConfig.from_hf({**CONFIG, "max_position_embeddings": 256, **fields})


def test_rope_scaling_wins_over_rope_parameters(caplog):
    both = config(rope_scaling=YARN, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    assert both.rope == config(rope_scaling=YARN).rope
    assert said(caplog, "rope_scaling", "is followed, not rope_parameters")


@pytest.mark.parametrize("kind", ["yarn", "llama3", "longrope"])
def test_the_outer_original_length_wins(caplog, kind):
    inner = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 128}
    inner |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    pairs = config().head_dim // 2
    inner |= {"short_factor": [1.0] * pairs, "long_factor": [2.0] * pairs}
    found = config(rope_parameters=inner, original_max_position_embeddings=32)
    assert found.rope.original_max_position_embeddings == 32
    assert said(caplog, "original_max_position_embeddings = 32 is followed")


def test_dtype_wins_over_torch_dtype(caplog):
    assert config(dtype="float16", torch_dtype="bfloat16").dtype == "float16"
    assert said(caplog, "'float16' is followed, not torch_dtype")


def test_quantization_config_wins_over_the_file_beside_it(tmp_path, caplog):
    path = tmp_path / "copy"
    shutil.copytree(paths.fixture("tiny-gptq-g128"), path)
    beside = json.loads((path / "config.json").read_text())["quantization_config"]
    (path / "quantize_config.json").unlink(missing_ok=True)
    (path / "quantize_config.json").write_text(json.dumps(beside | {"group_size": 64}))
    assert opened(path).linear("model.layers.0.self_attn.q_proj", 256, 256, False).group_size == 128
    assert said(caplog, "quantization_config.group_size = 128 is followed", "group_size = 64")


def test_positions_come_from_the_factor():
    assert config(rope_scaling=YARN).max_position_embeddings == 256
    assert config(rope_scaling=YARN | {"factor": 8.0}).max_position_embeddings == 512
    for kind in ("linear", "dynamic"):
        scaling = {"rope_type": kind, "factor": 2.0}
        assert config(rope_scaling=scaling).max_position_embeddings == 512


def nested(**inner) -> dict:
    text = json.loads((paths.require("architectures/gemma3-text") / "config.json").read_text())
    text.pop("architectures")
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "vision_config": {"hidden_size": 8, "num_hidden_layers": 1},
        "text_config": text | inner,
    }


def test_a_nested_text_config_is_the_model(caplog):
    flat = ModelConfig.from_hf(
        json.loads((paths.require("architectures/gemma3-text") / "config.json").read_text())
    )
    assert ModelConfig.from_hf(nested()) == flat
    assert ModelConfig.from_hf(nested() | {"hidden_size": 7, "dtype": "float16"}).hidden_size == 64
    assert said(caplog, "text_config.hidden_size = 64 is followed, not hidden_size = 7")
    assert "text_config" not in ModelConfig.from_hf(nested()).to_hf()


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
def test_names_of_a_model_that_holds_a_language_model(tmp_path, prefix):
    from safetensors.numpy import load_file, save_file

    stored = load_file(paths.require("architectures/gemma3-text") / "model.safetensors")
    plain = "" if prefix == "language_model." else "model."
    renamed = {prefix + name.removeprefix(plain): value for name, value in stored.items()}
    renamed["vision_tower.patch.weight"] = np.ones((2, 2), np.float32)
    save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(nested()))
    checkpoint = opened(tmp_path)
    name = "model.layers.5.mlp_output_norm.weight"
    expected = stored["model.layers.5.post_feedforward_layernorm.weight"]
    np.testing.assert_array_equal(checkpoint.tensor(name, (64,)), expected)


def test_a_base_model_without_prefixes(tmp_path):
    """As the GPT-2 that most people have."""
    from safetensors.numpy import load_file, save_file

    source = paths.require("architectures/gpt2")
    stored = load_file(source / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): value for name, value in stored.items()}
        | {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)},
        tmp_path / "model.safetensors",
    )
    shutil.copy(source / "config.json", tmp_path / "config.json")
    found, expected = opened(tmp_path), opened(source)
    for leaf, shape in (("q_proj", (64, 64)), ("v_proj", (64, 64))):
        prefix = f"model.layers.1.self_attn.{leaf}"
        np.testing.assert_array_equal(
            found.linear(prefix, *shape, True).weight[...],
            expected.linear(prefix, *shape, True).weight[...],
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"rope_type": ["yarn"]}}, r"rope_type = \['yarn'\]"),
        ({"rope_theta": 1.0}, r"rope_theta = 1"),
        ({"layer_types": [["full_attention"]]}, r"layer_types"),
        ({"layer_types": 3}, r"layer_types = 3"),
        ({"hidden_act": ["silu"]}, r"hidden_act"),
        ({"text_config": ["x"]}, r"text_config"),
    ],
)
def test_retyped_fields_are_refused_by_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf({**CONFIG, "num_hidden_layers": 1, **fields})
