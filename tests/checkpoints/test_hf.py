"""Hugging Face folders: what is read, what is checked, and what a wrong one says."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from specjax import checkpoints
from specjax.checkpoints import hf
from specjax.errors import CheckpointError, ConfigError
from specjax.models import llama
from specjax.quant.dense_linear import Linear
from tests import paths

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "dtype": "float16",
    "eos_token_id": 1,
}
SHAPES = {
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (24, 16),
    "mlp.up_proj": (24, 16),
    "mlp.down_proj": (16, 24),
    "input_layernorm": (16,),
    "post_attention_layernorm": (16,),
}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def tensors(dtype=np.float16, biases=()) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {f"model.layers.0.{name}.weight": shape for name, shape in SHAPES.items()}
    shapes |= {f"model.layers.0.{name}.bias": SHAPES[name][:1] for name in biases}
    shapes |= {"model.embed_tokens.weight": (32, 16), "lm_head.weight": (32, 16)}
    shapes |= {"model.norm.weight": (16,)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def folder(path: Path, weights: dict | None = None, **fields) -> Path:
    config = {k: v for k, v in (CONFIG | fields).items() if v is not None}
    (path / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(
        tensors() if weights is None else weights, path / "model.safetensors"
    )
    return path


def test_logits_of_a_real_checkpoint():
    """tiny-fp16 in float32 against transformers and torch."""
    checkpoint = checkpoints.open_checkpoint(paths.fixture("tiny-fp16"))
    assert (checkpoint.format, checkpoint.config.eos_token_ids) == ("hf", (1,))
    model = llama.build(checkpoint, jnp.float32)
    golden = safetensors.numpy.load_file(paths.golden("tiny-fp16.safetensors"))
    logits = jax.jit(llama.full_logits)(model, golden["input_ids"])
    np.testing.assert_allclose(logits, golden["logits"], atol=2e-4)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16], ids=str)
def test_dense_linears_keep_the_stored_dtype(tmp_path, dtype):
    weights = tensors(dtype)
    checkpoint = checkpoints.open_checkpoint(folder(tmp_path, weights))
    linear = checkpoint.linear(Q_PROJ, 16, 16, False)
    assert isinstance(linear, Linear) and linear.bias is None
    assert linear.weight[...].dtype == dtype
    np.testing.assert_array_equal(linear.weight[...], weights[f"{Q_PROJ}.weight"])
    assert checkpoint.has("model.norm.weight") and not checkpoint.has("model.norm.bias")


def test_sharded_folder_reads_like_a_single_file(tmp_path):
    weights, files = tensors(), {}
    for i, name in enumerate(weights):
        files[name] = f"model-{i % 3 + 1:05d}-of-00003.safetensors"
    path = folder(tmp_path)
    (path / "model.safetensors").unlink()
    for file in set(files.values()):
        held = {name: weights[name] for name in weights if files[name] == file}
        safetensors.numpy.save_file(held, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    # Not in the index: a stray file with a wrong tensor must not be looked at.
    wrong = {"model.norm.weight": np.zeros(16, np.float16)}
    safetensors.numpy.save_file(wrong, path / "model-00004-of-00003.safetensors")
    checkpoint = checkpoints.open_checkpoint(path)
    for name, expected in weights.items():
        np.testing.assert_array_equal(checkpoint.tensor(name, expected.shape), expected)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard model-00002-of-00003\.safetensors"):
        checkpoints.open_checkpoint(path)


def test_biases(tmp_path):
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    path = folder(tmp_path, tensors(biases=names), architectures=["Qwen2ForCausalLM"])
    checkpoint = checkpoints.open_checkpoint(path)
    assert checkpoint.config.qkv_bias
    linear = checkpoint.linear(Q_PROJ, 16, 16, True)
    expected = tensors(biases=names)[f"{Q_PROJ}.bias"]
    np.testing.assert_array_equal(linear.bias[...], expected)
    with pytest.raises(CheckpointError, match=r"o_proj\.bias is missing"):
        checkpoint.linear("model.layers.0.self_attn.o_proj", 16, 16, True)


def test_bias_that_the_configuration_does_not_state(tmp_path):
    weights = tensors(biases=["self_attn.q_proj"])
    checkpoint = checkpoints.open_checkpoint(folder(tmp_path, weights))
    with pytest.raises(CheckpointError, match=r"q_proj\.bias in .* is not zero"):
        checkpoint.linear(Q_PROJ, 16, 16, False)
    weights[f"{Q_PROJ}.bias"][:] = 0
    checkpoint = checkpoints.open_checkpoint(folder(tmp_path, weights))
    assert checkpoint.linear(Q_PROJ, 16, 16, False).bias is None


def test_dtype_from_the_weights_where_the_configuration_states_none(tmp_path):
    weights = tensors(ml_dtypes.bfloat16)
    assert (
        checkpoints.open_checkpoint(folder(tmp_path, weights, dtype=None)).config.dtype
        == "bfloat16"
    )


def test_generation_config_overrides_stop_ids(tmp_path):
    path = folder(tmp_path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 9]}))
    assert checkpoints.open_checkpoint(path).config.eos_token_ids == (1, 9)


def test_wrong_shape_names_tensor_found_and_expected(tmp_path):
    checkpoint = checkpoints.open_checkpoint(folder(tmp_path, hidden_size=32, head_dim=8))
    message = r"model\.norm\.weight in .* has shape \[16\].* asks for \[32\]"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.tensor("model.norm.weight", (32,))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight in .* \[16, 16\].* \[16, 32\]"):
        checkpoint.linear(Q_PROJ, 16, 32, False)


def test_missing_tensor_is_named(tmp_path):
    weights = tensors()
    del weights["lm_head.weight"]
    path = folder(tmp_path, weights, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        checkpoints.open_checkpoint(path)


def test_not_finite_weight_is_named(tmp_path):
    weights = tensors()
    weights["model.layers.0.mlp.up_proj.weight"][3, 4] = np.nan
    checkpoint = checkpoints.open_checkpoint(folder(tmp_path, weights))
    message = r"model\.layers\.0\.mlp\.up_proj\.weight in .* has the value nan at \(3, 4\)"
    with pytest.raises(CheckpointError, match=message):
        llama.build(checkpoint, jnp.float32)


def test_integer_weights_without_a_quantized_format(tmp_path):
    weights = tensors() | {f"{Q_PROJ}.weight": np.zeros((16, 16), np.int16)}
    checkpoint = checkpoints.open_checkpoint(folder(tmp_path, weights))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight in .* has dtype int16"):
        checkpoint.linear(Q_PROJ, 16, 16, False)


def test_configuration_is_refused_before_any_weight_is_looked_at(tmp_path):
    folder(tmp_path, architectures=["FalconForCausalLM"])
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"config\.json: architectures .*FalconForCausalLM"):
        checkpoints.open_checkpoint(tmp_path)


def test_unknown_quantization_method_is_refused(tmp_path):
    path = folder(tmp_path, quantization_config={"quant_method": "exl3"})
    with pytest.raises(CheckpointError, match="exl3"):
        checkpoints.open_checkpoint(path)


def test_quantized_folder_goes_through_its_format():
    checkpoint = checkpoints.open_checkpoint(paths.fixture("tiny-gptq-g128"))
    assert checkpoint.format == "gptq"
    assert checkpoint.linear(Q_PROJ, 256, 256, False).scheme.name == "w4a16"
    assert isinstance(checkpoint.linear("lm_head", 1024, 256, False), Linear)
    assert checkpoint.tensor("model.norm.weight", (256,)).shape == (256,)


def test_separate_quantize_config_is_read(tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(paths.fixture("tiny-gptq-g128"), path)
    (path / "config.json").chmod(0o644)
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    assert checkpoints.open_checkpoint(path).format == "gptq"


def test_head_folders_open_with_an_explicit_source():
    path = paths.fixture("eagle2-tiny")
    config = hf.ModelConfig.from_hf(json.loads((path / "config.json").read_text()))
    checkpoint = hf.HFCheckpoint(path, config, hf.sources.open_source(path))
    assert checkpoint.has("fc.weight") and not checkpoint.has("fc.bias")
    assert checkpoint.linear("fc", 256, 512, False).weight.shape == (256, 512)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing: no such file or folder"):
        checkpoints.open_checkpoint(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        checkpoints.open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(FileNotFoundError, match="no weights in"):
        checkpoints.open_checkpoint(tmp_path)


def test_folder_of_gguf_files_names_them(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(FileNotFoundError, match=r"pass one of a\.gguf"):
        checkpoints.open_checkpoint(tmp_path)


def test_single_weight_file_is_not_a_checkpoint(tmp_path):
    path = folder(tmp_path) / "model.safetensors"
    with pytest.raises(
        CheckpointError, match=r"expected a folder with a config\.json, or a \.gguf"
    ):
        checkpoints.open_checkpoint(path)
