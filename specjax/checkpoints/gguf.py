"""GGUF checkpoints under this library's names; `gguf_architectures` says what llama.cpp's architectures are."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from specjax.checkpoints import gguf_file, gguf_split
from specjax.checkpoints.gguf_architectures import (
    ARCHITECTURES,
    GLOBAL_NAMES,
    LAYER_NAMES,
    GGUFArchitecture,
)
from specjax.checkpoints.gguf_file import GGUFFile
from specjax.checkpoints.gguf_split import GGUFParts
from specjax.config import ModelConfig, RopeConfig
from specjax.errors import CheckpointError, ConfigError
from specjax.files import base as file_base
from specjax.quant import packing
from specjax.quant import scheme as schemes
from specjax.quant.dense_linear import Linear
from specjax.quant.linear import QuantizedLinear

_SCHEMES = {"Q4_0": "w4a16", "Q4_1": "w4a16-asym", "Q8_0": "w8a16"}
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
_LONG_FACTORS = {
    "short_factor": "rope_factors_short.weight",
    "long_factor": "rope_factors_long.weight",
}
_KNOWN = re.compile(
    rf"(({'|'.join(GLOBAL_NAMES.values())})\.(weight|bias)"
    rf"|blk\.\d+\.({'|'.join(LAYER_NAMES.values())})\.(weight|bias|scale|input_scale)"
    rf"|{'|'.join(map(re.escape, (_ROPE_FACTORS, *_LONG_FACTORS.values())))})"
)
_PROJECTIONS = {
    **{name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
}


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
        _refuse_unknown_tensors(file, self.config)
        self._declared = ARCHITECTURES[file.metadata["general.architecture"]]

    def has(self, name: str) -> bool:
        return _place(self.file, self._declared, name)[0] in self.file.names()

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor as floats: F16 and BF16 as stored, everything else in float32."""
        stored = _place(self.file, self._declared, name)[0]
        rows = self._rows(name, shape)
        array = gguf_file.dequantize(rows, self.file.info(stored)).reshape(shape)
        if (scale := self._scale(stored)) is not None:
            array = array.astype(np.float32) * scale
        file_base.check_finite(array, stored, self.path)
        if self.config.norm_offset and "norm" in name:
            # llama.cpp stores the whole gain.
            array = array.astype(np.float32) - np.float32(self.config.norm_offset)
        return array

    def linear(
        self, prefix: str, out_features: int, in_features: int, bias: bool
    ) -> Linear | QuantizedLinear:
        values = jnp.asarray(self.tensor(f"{prefix}.bias", (out_features,))) if bias else None
        name, shape = f"{prefix}.weight", (out_features, in_features)
        stored = _place(self.file, self._declared, name)[0]
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
        stored, members = _place(self.file, self._declared, name)
        leaf, _, kind = name.rpartition(".")
        sizes = [shape[0]]
        if members:
            layer = re.match(r"model\.layers\.\d+\.", name)[0]
            sizes = [self._outputs(member) for member in members]
            before = sum(sizes[: members.index(leaf.removeprefix(layer))])
        whole = (sum(sizes), *shape[1:])
        file_base.check_shape(self.file.info(stored).shape, whole, stored, self.path)
        rows = self.file.rows(stored)
        if kind == "bias" and (members or leaf.endswith(("q_proj", "k_proj"))):
            rows = rows.reshape(whole[0], -1)
        if members:
            rows = rows[before : before + shape[0]]
        if self._declared.permuted and leaf.endswith(("q_proj", "k_proj")):
            config = self.config
            heads = config.num_heads if leaf.endswith("q_proj") else config.num_kv_heads
            rows = rows[_rows_to_hf(shape[0], heads)]
        return rows.reshape(1, -1) if kind == "bias" else rows

    def _outputs(self, leaf: str) -> int:
        """Outputs of a projection that may be fused."""
        config = self.config
        if leaf.startswith("mlp."):
            return config.intermediate_size
        return config.head_dim * (config.num_heads if "q_proj" in leaf else config.num_kv_heads)


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
        "rms_norm_eps": metadata.required(metadata.declared.epsilon),
        "max_position_embeddings": metadata.required("context_length"),
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(i for i in stop_ids if i is not None)),
        "dtype": dtypes.get(embedding.type_name, "bfloat16"),
        "rope_theta": metadata.get("rope.freq_base"),
        "rope_scaling": metadata.rope_scaling(file),
    }
    fields |= {k: v for k, v in metadata.declared.fields(metadata.get).items() if v is not None}
    try:
        config = ModelConfig.from_hf(fields)
    except ConfigError as error:
        key = _CONFIG_KEYS.get(str(error).partition(" ")[0])
        where = "" if key is None else f"metadata key {metadata.name(key)}: "
        raise ConfigError(f"{file.path}: {where}{error}") from error
    metadata.check_head_dim(config)
    rope = config.rope
    if _ROPE_FACTORS in names:
        rope = _rope_from_factors(file, rope, config.head_dim)
    return _with_biases(file, metadata.declared, dataclasses.replace(config, rope=rope))


def _with_biases(file, declared: GGUFArchitecture, config: ModelConfig) -> ModelConfig:
    """The projections with biases: those that are stored.

    Raises:
        CheckpointError: some layers lack a bias that others have.
    """
    found, names = [], frozenset(file.names())
    for leaf, name in _PROJECTIONS.items():
        if leaf == "gate_proj" and not config.gated_mlp:
            continue
        stored = [
            _place(file, declared, f"model.layers.{index}.{name}.bias")[0]
            for index in range(config.num_layers)
        ]
        missing = [bias for bias in stored if bias not in names]
        if missing and len(missing) < len(stored):
            raise CheckpointError(f"{file.path}: {missing[0]} is missing, other layers have theirs")
        if not missing:
            found.append(leaf)
    qkv, o, mlp = (bool({*found} & {*group}) for group in _BIAS_GROUPS)
    config = dataclasses.replace(config, qkv_bias=qkv, o_bias=o, mlp_bias=mlp)
    expected = [leaf for leaf in _PROJECTIONS if config.has_bias(leaf)]
    if found == [leaf for leaf in expected if config.gated_mlp or leaf != "gate_proj"]:
        return config
    return dataclasses.replace(config, biases=tuple(found))


_BIAS_GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj", "down_proj"),
)


class _Metadata:
    """Keys below the architecture's name."""

    def __init__(self, file: GGUFFile | GGUFParts):
        self._file = file
        self._prefix = file.metadata.get("general.architecture")
        if self._prefix not in ARCHITECTURES:
            raise ConfigError(
                f"{file.path}: general.architecture = {self._prefix!r} is not supported "
                f"(supported: {', '.join(ARCHITECTURES)})"
            )
        self.declared = ARCHITECTURES[self._prefix]
        self._refuse("expert_count", (None, 0), "mixtures of experts")
        if not self.declared.window:
            self._refuse("attention.sliding_window", (None, 0), "sliding windows")

    @property
    def architecture(self) -> str:
        return self.declared.model

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

    def rope_scaling(self, file: GGUFFile | GGUFParts) -> dict[str, Any] | None:
        kind = self.get("rope.scaling.type")
        factor = self.get("rope.scaling.factor") or self.get("rope.scale_linear")
        original = self.get("rope.scaling.original_context_length") or self.get("context_length")
        attention = self.get("rope.scaling.attn_factor")
        if all(name in file.names() for name in _LONG_FACTORS.values()):
            factors = {k: _factors(file, name).tolist() for k, name in _LONG_FACTORS.items()}
            scaling = {"rope_type": "longrope", "original_max_position_embeddings": original}
            return scaling | factors | ({"attention_factor": attention} if attention else {})
        if kind is None and factor is not None and factor != 1:
            kind = "linear"
        if kind in (None, "none", "longrope"):
            return None
        if kind == "yarn" and factor:
            scaling = {
                "rope_type": kind,
                "factor": factor,
                "original_max_position_embeddings": original,
                "beta_fast": self.get("rope.scaling.yarn_beta_fast"),
                "beta_slow": self.get("rope.scaling.yarn_beta_slow"),
            }
            if attention not in (None, 1):
                scaling["attention_factor"] = attention * (1 + 0.1 * math.log(factor))
            return scaling
        if kind != "linear":
            raise ConfigError(
                f"{self._file.path}: {self._prefix}.rope.scaling.type = {kind!r} with factor {factor!r} is not "
                "supported (supported: none, linear, yarn, and longrope by its tensors of factors)"
            )
        return {"rope_type": kind, "factor": factor}

    def check_head_dim(self, config: ModelConfig) -> None:
        head_dim = config.head_dim
        keys = ("attention.key_length", "attention.value_length")
        if not (self.declared.partial or config.learned_positions):
            keys += ("rope.dimension_count",)
        for key in keys:
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
    factors = _factors(file, _ROPE_FACTORS)
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


def _factors(file: GGUFFile | GGUFParts, name: str) -> Shaped[np.ndarray, "F"]:
    """Divisors of rotary frequencies."""
    return gguf_file.dequantize(file.rows(name), file.info(name)).reshape(-1).astype(np.float64)


def _refuse_unknown_tensors(file: GGUFFile | GGUFParts, config: ModelConfig) -> None:
    """Refuses tensors that the model as its metadata describes it would not read."""
    absent = set() if config.learned_positions else {"position_embd"}
    for name, there in (
        ("input_layernorm", config.norm_placement != "after"),
        ("post_attention_layernorm", config.norm_placement != "after"),
        ("attention_output_norm", config.norm_placement != "before"),
        ("mlp_output_norm", config.norm_placement != "before"),
        ("self_attn.q_norm", config.qk_norm is not None),
        ("self_attn.k_norm", config.qk_norm is not None),
        ("mlp.gate_proj", config.gated_mlp),
    ):
        absent |= set() if there else {LAYER_NAMES[name]}
    for name in file.names():
        if not _KNOWN.fullmatch(name) or absent & set(name.split(".")):
            raise CheckpointError(
                f"{file.path}: tensor {name} is not part of {config.architecture}; supported are the tensors of "
                f"{', '.join(ARCHITECTURES)}"
            )


def _gguf_name(name: str) -> str:
    """The GGUF name of a parameter; names without one are returned as they are."""
    prefix, _, kind = name.rpartition(".")
    if prefix in GLOBAL_NAMES:
        return f"{GLOBAL_NAMES[prefix]}.{kind}"
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", prefix)
    if match and match[2] in LAYER_NAMES:
        return f"blk.{match[1]}.{LAYER_NAMES[match[2]]}.{kind}"
    return name


def _place(file, declared: GGUFArchitecture, name: str) -> tuple[str, tuple[str, ...]]:
    """The GGUF name of a parameter, and the linears that it is fused of, if it is stored so."""
    own = _gguf_name(name)
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:
        return own, ()
    for fused, members in declared.fused.items():
        if match[2] not in members:
            continue
        # Each member by itself is found by the first, which has a name of its own in any case.
        first = f"blk.{match[1]}.{LAYER_NAMES[members[0]]}.weight"
        if first not in file.names():
            return f"blk.{match[1]}.{fused}.{match[3]}", members
    return own, ()


def _rows_to_hf(num_rows: int, heads: int) -> Shaped[np.ndarray, "N"]:
    """Index of the GGUF row for each Hugging Face row: pairs (2i, 2i + 1) of a head go to (i, i +
    C/2)."""
    order = np.arange(num_rows).reshape(heads, -1, 2)
    return order.swapaxes(1, 2).reshape(-1)
