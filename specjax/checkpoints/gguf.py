"""GGUF checkpoints of the llama and qwen2 architectures under Hugging Face names.

llama.cpp rotates neighbouring channels of queries and keys, Hugging Face channels C/2 apart; its
converter therefore reorders the rows of q_proj and k_proj of llama models. Here they go back,
before decoding, so one index serves codes, scales and minima.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from specjax.checkpoints import gguf_file, gguf_split
from specjax.checkpoints.gguf_file import GGUFFile
from specjax.checkpoints.gguf_split import GGUFParts
from specjax.config import ModelConfig, RopeConfig
from specjax.errors import CheckpointError, ConfigError
from specjax.files import base as file_base
from specjax.quant import packing
from specjax.quant import scheme as schemes
from specjax.quant.dense_linear import Linear
from specjax.quant.linear import QuantizedLinear

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_SCHEMES = {"Q4_0": "w4a16", "Q4_1": "w4a16-asym", "Q8_0": "w8a16"}
_GLOBAL_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Where the fields of a configuration stand in the metadata, below the architecture's name: for messages.
_CONFIG_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
}
_ROPE_FACTORS = "rope_freqs.weight"
_KNOWN = re.compile(
    rf"(({'|'.join(_GLOBAL_NAMES.values())})\.weight"
    rf"|blk\.\d+\.({'|'.join(_LAYER_NAMES.values())})\.(weight|bias|scale|input_scale)|{re.escape(_ROPE_FACTORS)})"
)


class GGUFCheckpoint:
    """A GGUF file; Q4_0, Q4_1 and Q8_0 linears keep their codes, other types are decoded to floats.

    Attributes:
        path: the file.
        config: the model's configuration.
        format: "gguf".
        file: metadata (the tokenizer's too) and tensors as stored.
    """

    format = "gguf"

    def __init__(self, file: GGUFFile | GGUFParts):
        self.path = file.path
        self.file = file
        self.config = read_config(file)
        _refuse_unknown_tensors(file)
        self._permuted = file.metadata["general.architecture"] == "llama"

    def has(self, name: str) -> bool:
        return _gguf_name(name) in self.file.names()

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor as floats: F16 and BF16 as stored, everything else in float32."""
        stored = _gguf_name(name)
        rows = self._rows(name, shape)
        array = gguf_file.dequantize(rows, self.file.info(stored)).reshape(shape)
        if (scale := self._scale(stored)) is not None:
            array = array.astype(np.float32) * scale
        file_base.check_finite(array, stored, self.path)
        return array

    def linear(
        self, prefix: str, out_features: int, in_features: int, bias: bool
    ) -> Linear | QuantizedLinear:
        values = jnp.asarray(self.tensor(f"{prefix}.bias", (out_features,))) if bias else None
        name, shape = f"{prefix}.weight", (out_features, in_features)
        stored = _gguf_name(name)
        type_name = self.file.info(stored).type_name
        if type_name not in gguf_file.BLOCK_TYPES or self._scale(stored) is not None:
            return Linear(jnp.asarray(self.tensor(name, shape)), values)
        codes, scales, minima = gguf_file.decode_blocks(self._rows(name, shape), type_name)
        for floats in (scales, minima):
            if floats is not None:
                file_base.check_finite(np.ascontiguousarray(floats), stored, self.path)
        scheme = schemes.lookup(_SCHEMES[type_name])
        return QuantizedLinear(
            codes=packing.to_device(codes, scheme.weights.code_dtype),
            scales=jnp.asarray(scales),
            minima=None if minima is None else jnp.asarray(minima),
            bias=values,
            scheme=scheme,
            group_size=gguf_file.GROUP_SIZE,
        )

    def _scale(self, stored: str) -> np.float32 | None:
        """The factor of a whole weight (NVFP4 has one), or None."""
        name = f"{stored.removesuffix('.weight')}.scale"
        if not stored.endswith(".weight") or name not in self.file.names():
            return None
        info = self.file.info(name)
        file_base.check_shape(info.shape, (1,), name, self.path)
        value = gguf_file.dequantize(self.file.rows(name), info).astype(np.float32).reshape(1)
        file_base.check_finite(value, name, self.path)
        return value[0]

    def _rows(self, name: str, shape: tuple[int, ...]) -> Shaped[np.ndarray, "N row_bytes"]:
        """Encoded rows in Hugging Face order; the shape is checked."""
        stored = _gguf_name(name)
        file_base.check_shape(self.file.info(stored).shape, shape, stored, self.path)
        rows = self.file.rows(stored)
        match = re.search(r"\.(q_proj|k_proj)\.(weight|bias)$", name)
        if match is None or not self._permuted:
            return rows
        heads = self.config.num_heads if match[1] == "q_proj" else self.config.num_kv_heads
        if match[2] == "bias":
            return rows.reshape(shape[0], -1)[_rows_to_hf(shape[0], heads)].reshape(1, -1)
        return rows[_rows_to_hf(shape[0], heads)]


def open_file(path: Path) -> GGUFCheckpoint:
    """Opens a .gguf file; of one that is split, any part.

    Raises:
        ConfigError: an architecture or setting that is not supported; the metadata key is named.
        CheckpointError: malformed, truncated, or with tensors that do not belong to such a model.
    """
    return GGUFCheckpoint(gguf_split.open_parts(path))


def read_config(file: GGUFFile | GGUFParts) -> ModelConfig:
    """The model's configuration from the metadata and the names of the tensors.

    Raises:
        ConfigError: a key is missing or has an unsupported value.
    """
    metadata = _Metadata(file)
    embedding = file.info("token_embd.weight")
    names = file.names()
    stop = ("eos_token_id", "eot_token_id", "eom_token_id")
    stop_ids = [file.metadata.get(f"tokenizer.ggml.{key}") for key in stop]
    # A quantized file states no compute dtype: bfloat16 has the range of the original weights.
    dtypes = {"F16": "float16", "F32": "float32"}
    fields = {
        "architectures": [metadata.architecture],
        "vocab_size": embedding.shape[0],
        "hidden_size": metadata.required("embedding_length"),
        "intermediate_size": metadata.required("feed_forward_length"),
        "num_hidden_layers": metadata.required("block_count"),
        "num_attention_heads": metadata.required("attention.head_count"),
        "num_key_value_heads": metadata.get("attention.head_count_kv"),
        "head_dim": metadata.get("attention.key_length"),
        "rms_norm_eps": metadata.required("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": metadata.required("context_length"),
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(i for i in stop_ids if i is not None)),
        "dtype": dtypes.get(embedding.type_name, "bfloat16"),
        "rope_theta": metadata.get("rope.freq_base"),
        "rope_scaling": metadata.rope_scaling(),
    }
    try:
        config = ModelConfig.from_hf(fields)
    except ConfigError as error:
        key = _CONFIG_KEYS.get(str(error).partition(" ")[0])
        where = "" if key is None else f"metadata key {metadata.name(key)}: "
        raise ConfigError(f"{file.path}: {where}{error}") from error
    metadata.check_head_dim(config.head_dim)
    rope = config.rope
    if _ROPE_FACTORS in names:
        rope = _rope_from_factors(file, rope, config.head_dim)
    return dataclasses.replace(
        config,
        rope=rope,
        qkv_bias="blk.0.attn_q.bias" in names,
        o_bias="blk.0.attn_output.bias" in names,
        mlp_bias="blk.0.ffn_up.bias" in names,
    )


class _Metadata:
    """Keys below the architecture's name."""

    def __init__(self, file: GGUFFile | GGUFParts):
        self._file = file
        self._prefix = file.metadata.get("general.architecture")
        if self._prefix not in _ARCHITECTURES:
            raise ConfigError(
                f"{file.path}: general.architecture = {self._prefix!r} is not supported "
                f"(supported: {', '.join(_ARCHITECTURES)})"
            )
        self._refuse("expert_count", (None, 0), "mixtures of experts")
        self._refuse("attention.sliding_window", (None, 0), "sliding windows")

    @property
    def architecture(self) -> str:
        return _ARCHITECTURES[self._prefix]

    def name(self, key: str) -> str:
        """The whole key."""
        return f"{self._prefix}.{key}"

    def get(self, key: str) -> Any:
        return self._file.metadata.get(f"{self._prefix}.{key}")

    def required(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ConfigError(f"{self._file.path}: metadata key {self._prefix}.{key} is missing")
        return value

    def rope_scaling(self) -> dict[str, Any] | None:
        kind = self.get("rope.scaling.type")
        factor = self.get("rope.scaling.factor") or self.get("rope.scale_linear")
        if kind is None and factor is not None and factor != 1:
            kind = "linear"
        if kind in (None, "none"):
            return None
        if kind != "linear":
            raise ConfigError(
                f"{self._file.path}: {self._prefix}.rope.scaling.type = {kind!r} is not supported "
                "(supported: none, linear)"
            )
        return {"rope_type": kind, "factor": factor}

    def check_head_dim(self, head_dim: int) -> None:
        for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
            self._refuse(key, (None, head_dim), f"anything but the head size {head_dim}")

    def _refuse(self, key: str, accepted: tuple, what: str) -> None:
        if self.get(key) not in accepted:
            raise ConfigError(
                f"{self._file.path}: {self._prefix}.{key} = {self.get(key)!r}: "
                f"{what} is not supported"
            )


def _rope_from_factors(file: GGUFFile | GGUFParts, rope: RopeConfig, head_dim: int) -> RopeConfig:
    """llama.cpp stores Llama 3's frequency scaling as one divisor per frequency; finds the setting
    that gives them.

    The published models share all numbers but the factor, which is the largest divisor.
    """
    info = file.info(_ROPE_FACTORS)
    factors = gguf_file.dequantize(file.rows(_ROPE_FACTORS), info).reshape(-1).astype(np.float64)
    plain = dataclasses.replace(rope, kind="default", factor=1.0)
    candidate = dataclasses.replace(rope, kind="llama3", factor=float(factors.max()))
    if factors.size == head_dim // 2 and factors.min() > 0:
        if np.all(factors == 1):
            return rope
        expected = plain.inv_freq(head_dim) / candidate.inv_freq(head_dim).astype(np.float64)
        if rope.kind == "default" and np.allclose(factors, expected, rtol=1e-4):
            return candidate
    raise ConfigError(
        f"{file.path}: the frequency divisors in {_ROPE_FACTORS} (largest {factors.max():g}) are "
        f"not those of Llama 3 rope scaling with low_freq_factor = {candidate.low_freq_factor:g}, "
        f"high_freq_factor = {candidate.high_freq_factor:g} and "
        f"original_max_position_embeddings = {candidate.original_max_position_embeddings}"
    )


def _refuse_unknown_tensors(file: GGUFFile | GGUFParts) -> None:
    for name in file.names():
        if not _KNOWN.fullmatch(name):
            raise CheckpointError(
                f"{file.path}: tensor {name} is not part of a supported model (llama, qwen2)"
            )


def _gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face parameter; names without one are returned as they are."""
    prefix, _, kind = name.rpartition(".")
    if prefix in _GLOBAL_NAMES:
        return f"{_GLOBAL_NAMES[prefix]}.{kind}"
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", prefix)
    if match and match[2] in _LAYER_NAMES:
        return f"blk.{match[1]}.{_LAYER_NAMES[match[2]]}.{kind}"
    return name


def _rows_to_hf(num_rows: int, heads: int) -> Shaped[np.ndarray, "N"]:
    """Index of the GGUF row for each Hugging Face row: pairs (2i, 2i + 1) of a head go to (i, i +
    C/2)."""
    order = np.arange(num_rows).reshape(heads, -1, 2)
    return order.swapaxes(1, 2).reshape(-1)
