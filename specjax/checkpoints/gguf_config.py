"""The configuration of a GGUF file: metadata as fields of a config.json, and what the tensors' names say."""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Shaped

from specjax.checkpoints import gguf_file
from specjax.checkpoints.gguf_architectures import ARCHITECTURES, GGUFArchitecture, place
from specjax.checkpoints.gguf_file import GGUFFile
from specjax.checkpoints.gguf_split import GGUFParts
from specjax.checkpoints.names import projections_of
from specjax.config import ModelConfig, RopeConfig
from specjax.errors import CheckpointError, ConfigError

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
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS = {
    "short_factor": "rope_factors_short.weight",
    "long_factor": "rope_factors_long.weight",
}


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
    if ROPE_FACTORS in names:
        rope = _rope_from_factors(file, rope, config.head_dim)
    return _with_biases(file, metadata.declared, dataclasses.replace(config, rope=rope))


def _with_biases(file, declared: GGUFArchitecture, config: ModelConfig) -> ModelConfig:
    """The projections with biases: those that are stored.

    Raises:
        CheckpointError: some layers lack a bias that others have.
    """
    found, names = [], frozenset(file.names())
    projections = projections_of(config)
    for leaf, name in projections.items():
        stored = [
            place(file, declared, f"model.layers.{index}.{name}.bias")[0]
            for index in range(config.num_layers)
        ]
        missing = [bias for bias in stored if bias not in names]
        if missing and len(missing) < len(stored):
            raise CheckpointError(f"{file.path}: {missing[0]} is missing, other layers have theirs")
        if not missing:
            found.append(leaf)
    qkv, o, mlp = (bool({*found} & {*group}) for group in _BIAS_GROUPS)
    config = dataclasses.replace(config, qkv_bias=qkv, o_bias=o, mlp_bias=mlp)
    if found == [leaf for leaf in projections if config.has_bias(leaf)]:
        return config
    return dataclasses.replace(config, biases=tuple(found))


_BIAS_GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj", "down_proj"),
)


# What llama.cpp computes of keys that change the model; each with the values under which they change nothing.
_NEUTRAL: dict[str, tuple] = {
    "attention.causal": (None, True),
    "attention.clamp_kqv": (None, 0),
    "attention.max_alibi_bias": (None, 0),
    "attention.scale": (None, 0),
    "attn_logit_softcapping": (None, 0),
    "embedding_scale": (None, 0, 1),
    "final_logit_softcapping": (None, 0),
    "logit_scale": (None, 0, 1),
    "residual_scale": (None, 0, 1),
    "rope.scaling.yarn_attn_factor": (None, 1),
    "rope.scaling.yarn_ext_factor": (None, 1),
    "rope.scaling.yarn_log_multiplier": (None, 0),
    "use_parallel_residual": (None, False),
}


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
        for key, neutral in _NEUTRAL.items():
            if key not in self.declared.scales:
                self._refuse(key, neutral, f"this setting of {self.declared.model}")

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
        if all(name in file.names() for name in LONG_FACTORS.values()):
            factors = {k: _factors(file, name).tolist() for k, name in LONG_FACTORS.items()}
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
    factors = _factors(file, ROPE_FACTORS)
    plain = dataclasses.replace(rope, kind="default", factor=1.0)
    candidate = dataclasses.replace(rope, kind="llama3", factor=float(factors.max()))
    if factors.size == head_dim // 2 and factors.min() > 0:
        if np.all(factors == 1):
            return rope
        expected = plain.inv_freq(head_dim) / candidate.inv_freq(head_dim).astype(np.float64)
        if rope.kind == "default" and np.allclose(factors, expected, rtol=1e-4):
            return candidate
    raise ConfigError(
        f"{file.path}: the frequency divisors in {ROPE_FACTORS} (largest {factors.max():g}) are "
        f"not those of Llama 3 rope scaling with low_freq_factor = {candidate.low_freq_factor:g}, "
        f"high_freq_factor = {candidate.high_freq_factor:g} and "
        f"original_max_position_embeddings = {candidate.original_max_position_embeddings}"
    )


def _factors(file: GGUFFile | GGUFParts, name: str) -> Shaped[np.ndarray, "F"]:
    """Divisors of rotary frequencies."""
    return gguf_file.dequantize(file.rows(name), file.info(name)).reshape(-1).astype(np.float64)
