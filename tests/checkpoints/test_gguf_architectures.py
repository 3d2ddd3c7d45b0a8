"""GGUF files as llama.cpp's converter makes them, of the tiny checkpoints of every architecture that it has."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import checkpoints
from specjax.checkpoints import gguf, hf
from specjax.config import ModelConfig
from specjax.models import llama
from tests import paths
from tests.checkpoints.test_gguf import write

# By architecture: the checkpoint, metadata beside the generic keys, and what llama.cpp cannot state and its constants
# decide, as fields of config.json.
CASES = {
    "llama": ("mistral-swa", {"attention.sliding_window": 16}, {}),
    "qwen3": ("qwen3-tied", {}, {}),
    "granite": (
        "granite",
        {
            "attention.scale": 0.17,
            "embedding_scale": 2.5,
            "residual_scale": 0.6,
            "logit_scale": 2.0,
        },
        {},
    ),
    "smollm3": ("smollm3", {}, {"no_rope_layers": [1, 1, 1, 0]}),
    "gemma2": (
        "gemma2",
        {
            "attention.sliding_window": 16,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 8.0,
        },
        {"query_pre_attn_scalar": 24},
    ),
    "gemma3": (
        "gemma3-text",
        {
            "attention.sliding_window": 16,
            "attention.sliding_window_pattern": 3,
            "rope.freq_base_swa": 10000.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        {"query_pre_attn_scalar": 24},
    ),
    "phi3": ("phi3-longrope", {"rope.scaling.original_context_length": 32}, {}),
    "gpt2": ("gpt2", {}, {}),
    "glm4": ("glm4", {}, {}),
}
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "attention_output_norm": "post_attention_norm",
    "mlp_output_norm": "post_ffw_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
REORDERED = ("llama", "granite", "smollm3")
FUSED_QKV, FUSED_GATE_UP = ("phi3", "gpt2"), ("phi3", "glm4")


def source(architecture: str) -> hf.HFCheckpoint:
    """The Hugging Face checkpoint, with what its GGUF file would be read as."""
    name, _, changes = CASES[architecture]
    folder = paths.require(f"architectures/{name}")
    checkpoint = checkpoints.open_checkpoint(folder)
    fields = json.loads((folder / "config.json").read_text()) | changes
    return hf.HFCheckpoint(folder, ModelConfig.from_hf(fields), checkpoint.source)


def converted(architecture: str, checkpoint: hf.HFCheckpoint) -> dict:
    """Tensors as llama.cpp's converter names, orders, fuses and shifts them."""
    config, model = checkpoint.config, llama.build(checkpoint, jnp.float32)
    shift = 1.0 if architecture.startswith("gemma") else 0.0

    def norm(name, module) -> dict:
        found = {f"{name}.weight": np.asarray(module.weight[...]) + np.float32(shift)}
        bias = getattr(module, "bias", None)
        return found if bias is None else found | {f"{name}.bias": np.asarray(bias[...])}

    found = {"token_embd.weight": np.asarray(model.model.embed_tokens.weight[...])}
    found |= norm("output_norm", model.model.norm)
    if model.model.embed_positions is not None:
        found["position_embd.weight"] = np.asarray(model.model.embed_positions.weight[...])
    if model.lm_head is not None:
        found["output.weight"] = np.asarray(model.lm_head.weight[...])
    for index, layer in enumerate(model.model.layers):
        arrays = {}
        for leaf, stored in NAMES.items():
            part = layer
            for step in leaf.split("."):
                part = getattr(part, step, None)
            if part is None:
                continue
            if "norm" in leaf:
                found |= norm(f"blk.{index}.{stored}", part)
                continue
            for kind in ("weight", "bias"):
                values = getattr(part, kind)
                if values is None:
                    continue
                values = np.asarray(values[...])
                if architecture in REORDERED and stored in ("attn_q", "attn_k"):
                    heads = config.num_heads if stored == "attn_q" else config.num_kv_heads
                    values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2)
                    values = values.reshape(-1, *values.shape[3:])
                arrays[f"{stored}.{kind}"] = values
        for kind in ("weight", "bias"):
            if architecture in FUSED_QKV and f"attn_q.{kind}" in arrays:
                parts = [arrays.pop(f"attn_{part}.{kind}") for part in "qkv"]
                arrays[f"attn_qkv.{kind}"] = np.concatenate(parts)
        if architecture in FUSED_GATE_UP:
            parts = [arrays.pop(f"ffn_{part}.weight") for part in ("gate", "up")]
            arrays["ffn_up.weight"] = np.concatenate(parts)
        found |= {f"blk.{index}.{name}": values for name, values in arrays.items()}
    if architecture == "phi3":
        for length in ("short", "long"):
            values = getattr(config.rope, f"{length}_factor")
            found[f"rope_factors_{length}.weight"] = np.asarray(values, np.float32)
    return {name: ("F32", values) for name, values in found.items()}


def metadata(architecture: str, config: ModelConfig) -> dict:
    _, more, _ = CASES[architecture]
    epsilon = "layer_norm_epsilon" if config.norm_kind == "layer" else "layer_norm_rms_epsilon"
    keys = {
        "context_length": 256 if config.max_position_embeddings > 64 else 64,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        f"attention.{epsilon}": config.rms_norm_eps,
        **more,
    }
    if not config.learned_positions:
        keys["rope.freq_base"] = config.rope.theta
        keys["rope.dimension_count"] = config.rope.rotary_dim(config.head_dim)
    if config.rope.kind == "longrope":
        keys["rope.scaling.attn_factor"] = config.rope.attention_factor
    below = {f"{architecture}.{key}": value for key, value in keys.items()}
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_ids[0]}
    ids = {f"tokenizer.ggml.{key}": value for key, value in ids.items()}
    return {"general.architecture": architecture, **below, **ids}


@pytest.mark.parametrize("architecture", CASES)
def test_a_converted_file_is_the_checkpoint(tmp_path, architecture):
    """The same settings and the same parameters, so the same model."""
    original = source(architecture)
    path = write(
        tmp_path / "m.gguf",
        metadata(architecture, original.config),
        converted(architecture, original),
    )
    found = gguf.open_file(path)
    rounded = ("rms_norm_eps", "query_scale", "residual_multiplier")  # float32 in the file
    for name, wanted in vars(original.config).items():
        value = getattr(found.config, name)
        if name in rounded and wanted is not None:
            assert value == pytest.approx(wanted, rel=1e-6), name
        elif name not in ("source", "dtype", "rope"):
            assert value == wanted, name
    rope, wanted = found.config.rope, original.config.rope
    assert (rope.kind, rope.interleaved) == (wanted.kind, wanted.interleaved)
    for long in (False, True):
        np.testing.assert_allclose(
            rope.inv_freq(found.config.head_dim, long),
            wanted.inv_freq(original.config.head_dim, long),
            rtol=1e-6,
        )
    assert rope.attention_factor == pytest.approx(wanted.attention_factor, rel=1e-6)
    ours = llama.build(found, jnp.float32)
    for left, right in zip(
        jax.tree.leaves(ours), jax.tree.leaves(llama.build(original, jnp.float32)), strict=True
    ):
        np.testing.assert_allclose(left, right, atol=3e-7)
