"""Model configuration, read from the fields of a Hugging Face `config.json` in either spelling.

transformers 4 wrote `torch_dtype`, `rope_theta` and `rope_scaling`; transformers 5 writes `dtype`
and `rope_parameters`. Whatever would change the computation and is not implemented is refused here
by the field's name, before a weight is read.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32

from specjax.config.depth import DepthConfig
from specjax.errors import ConfigError

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
}
DTYPES = ("float32", "float16", "bfloat16")
ROPE_KINDS = ("default", "linear", "llama3")
_MAX_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768}


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: base and frequency scaling.

    Attributes:
        theta: base of the geometric series of wavelengths.
        kind: "default" (none), "linear" (all frequencies / factor), or "llama3" (only the slow
            ones).
        factor: how many times slower the scaled frequencies turn.
        low_freq_factor: llama3: wavelengths above original / low_freq_factor are scaled fully.
        high_freq_factor: llama3: wavelengths below original / high_freq_factor are left alone.
        original_max_position_embeddings: llama3: context length before scaling, in tokens.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "RopeConfig":
        """Reads `rope_parameters`, or `rope_theta` with `rope_scaling`.

        Raises:
            ConfigError: the type is unknown, or a field of it is missing or out of range.
        """
        name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
        fields = config.get(name) or {}
        if not isinstance(fields, dict):
            raise ConfigError(f"{name} = {fields!r}: expected an object")
        theta = fields.get("rope_theta", config.get("rope_theta"))
        theta = 10000.0 if theta is None else _positive("rope_theta", theta)
        kind = fields.get("rope_type", fields.get("type", "default"))
        if kind not in ROPE_KINDS:
            raise ConfigError(
                f"{name}.rope_type = {kind!r} is not supported (supported: {', '.join(ROPE_KINDS)})"
            )
        partial = fields.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if partial not in (None, 1):
            raise ConfigError(f"partial_rotary_factor = {partial!r} is not supported (only 1)")
        if kind == "default":
            return cls(theta=theta)
        required = ("factor",)
        if kind == "llama3":
            required += ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        values = {key: _positive(f"{name}.{key}", fields.get(key)) for key in required}
        if kind == "llama3":
            values["original_max_position_embeddings"] = int(values[required[-1]])
            if values["high_freq_factor"] <= values["low_freq_factor"]:
                raise ConfigError(
                    f"{name}.high_freq_factor = {values['high_freq_factor']} must exceed "
                    f"low_freq_factor = {values['low_freq_factor']}"
                )
        return cls(theta=theta, kind=kind, **values)

    def to_hf(self) -> dict[str, Any]:
        """The object `rope_parameters` of a config.json."""
        fields: dict[str, Any] = {"rope_type": self.kind, "rope_theta": self.theta}
        if self.kind != "default":
            fields["factor"] = self.factor
        if self.kind == "llama3":
            fields["low_freq_factor"] = self.low_freq_factor
            fields["high_freq_factor"] = self.high_freq_factor
            fields["original_max_position_embeddings"] = self.original_max_position_embeddings
        return fields

    def inv_freq(self, head_dim: int) -> Float32[np.ndarray, "F"]:
        """Angle per position of each rotated pair, in radians; pair i is channels (i, i + C/2)."""
        frequencies = self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.kind == "linear":
            frequencies = frequencies / self.factor
        elif self.kind == "llama3":
            turns = frequencies * self.original_max_position_embeddings / (2 * math.pi)
            span = self.high_freq_factor - self.low_freq_factor
            keep = np.clip((turns - self.low_freq_factor) / span, 0.0, 1.0)
            frequencies = frequencies * (keep + (1.0 - keep) / self.factor)
        return frequencies.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and constants of a Llama-family model; hashable, so it can be static in a jitted
    program.

    Attributes:
        architecture: Hugging Face class name, one of `ARCHITECTURES`.
        vocab_size: rows of the embedding table.
        hidden_size: width of the residual stream.
        intermediate_size: width of the feed-forward.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key/value heads; divides num_heads.
        head_dim: channels of one head; not always hidden_size / num_heads.
        rms_norm_eps: added to the mean square in every norm.
        rope: rotary embedding.
        tie_word_embeddings: the output head is the embedding table.
        qkv_bias: q_proj, k_proj and v_proj have a bias.
        o_bias: o_proj has a bias.
        mlp_bias: gate_proj, up_proj and down_proj have a bias.
        max_position_embeddings: longest sequence the model was made for, in tokens.
        bos_token_id: token that starts a sequence, if any.
        eos_token_ids: tokens that end generation, possibly none.
        dtype: the checkpoint's own compute dtype, one of `DTYPES`.
        depth: of models with routed layers; None: every token runs through all layers.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str
    depth: DepthConfig | None = None

    @classmethod
    def from_hf(
        cls, config: dict[str, Any], generation_config: dict[str, Any] | None = None
    ) -> "ModelConfig":
        """Reads a parsed config.json; token ids of generation_config.json take precedence.

        Raises:
            ConfigError: a field is missing, malformed, or asks for something not implemented.
        """
        architecture = _architecture(config)
        family = ARCHITECTURES[architecture]
        _refuse_variants(config, family)
        heads = _size(config, "num_attention_heads")
        kv_heads = _size(config, "num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise ConfigError(
                f"num_attention_heads = {heads} is not a multiple of "
                f"num_key_value_heads = {kv_heads}"
            )
        attention_bias = family == "llama" and _flag(config, "attention_bias")
        ids = {**config, **{k: v for k, v in (generation_config or {}).items() if v is not None}}
        return cls(
            architecture=architecture,
            vocab_size=_size(config, "vocab_size"),
            hidden_size=_size(config, "hidden_size"),
            intermediate_size=_size(config, "intermediate_size"),
            num_layers=_size(config, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=_head_dim(config, heads),
            rms_norm_eps=_positive("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
            rope=RopeConfig.from_hf(config),
            tie_word_embeddings=_flag(config, "tie_word_embeddings"),
            qkv_bias=attention_bias or family == "qwen2",
            o_bias=attention_bias,
            mlp_bias=family == "llama" and _flag(config, "mlp_bias"),
            max_position_embeddings=_size(
                config, "max_position_embeddings", default=_MAX_POSITIONS[family]
            ),
            bos_token_id=next(iter(_token_ids(ids, "bos_token_id")), None),
            eos_token_ids=_token_ids(ids, "eos_token_id"),
            dtype=_dtype(config),
            depth=DepthConfig.from_hf(config),
        )

    def to_hf(self) -> dict[str, Any]:
        """A config.json that transformers 4 and 5 (and `from_hf`) read back to this configuration.

        Raises:
            ConfigError: the biases are a combination that the architecture cannot state.
        """
        family = ARCHITECTURES[self.architecture]
        implied = {"llama": self.o_bias, "mistral": False, "qwen2": True}[family]
        if self.qkv_bias != implied or (family != "llama" and (self.o_bias or self.mlp_bias)):
            raise ConfigError(
                f"{self.architecture} cannot state qkv_bias = {self.qkv_bias} with "
                f"o_bias = {self.o_bias} and mlp_bias = {self.mlp_bias}"
            )
        rope = self.rope.to_hf()
        eos = self.eos_token_ids
        fields: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": rope,
            "rope_theta": self.rope.theta,
            "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"}
            if self.rope.kind != "default"
            else None,
            "tie_word_embeddings": self.tie_word_embeddings,
            "max_position_embeddings": self.max_position_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": (eos[0] if len(eos) == 1 else list(eos)) if eos else None,
            "dtype": self.dtype,
            "torch_dtype": self.dtype,
        }
        match family:
            case "llama":
                fields |= {"attention_bias": self.o_bias, "mlp_bias": self.mlp_bias}
            case "mistral":
                fields |= {"sliding_window": None}
            case "qwen2":
                fields |= {"use_sliding_window": False}
        return fields | ({} if self.depth is None else self.depth.to_hf())


def _architecture(config: dict[str, Any]) -> str:
    names = config.get("architectures")
    if not names:
        model_type = config.get("model_type")
        by_type = {family: name for name, family in ARCHITECTURES.items()}
        if model_type not in by_type:
            raise ConfigError(
                f"model_type = {model_type!r} is not supported (supported: {', '.join(by_type)})"
            )
        return by_type[model_type]
    name = names[0] if isinstance(names, list) else names
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"architectures = {names!r} is not supported (supported: {', '.join(ARCHITECTURES)})"
        )
    return name


def _refuse_variants(config: dict[str, Any], family: str) -> None:
    """Refuses fields under which the same architecture computes something else."""
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConfigError(f"hidden_act = {activation!r} is not supported (supported: silu)")
    if family == "mistral" and config.get("sliding_window") is not None:
        raise ConfigError(
            f"sliding_window = {config['sliding_window']!r} is not supported "
            "(only null: full attention)"
        )
    if family == "qwen2" and config.get("use_sliding_window"):
        raise ConfigError("use_sliding_window = true is not supported (only full attention)")
    other = set(config.get("layer_types") or ()) - {"full_attention"}
    if other:
        raise ConfigError(f"layer_types has {sorted(other)}: only full_attention is supported")
    for field in ("mlp_bias",) if family == "qwen2" else ("attention_bias", "mlp_bias"):
        if family != "llama" and config.get(field):
            raise ConfigError(f"{field} = true is not supported for model type {family}")


def _head_dim(config: dict[str, Any], heads: int) -> int:
    hidden = _size(config, "hidden_size")
    if config.get("head_dim") is None and hidden % heads:
        raise ConfigError(
            f"hidden_size = {hidden} is not a multiple of num_attention_heads = {heads} "
            "and head_dim is not given"
        )
    head_dim = _size(config, "head_dim", default=hidden // heads)
    if head_dim % 2:
        raise ConfigError(f"head_dim = {head_dim} must be even for the rotary embedding")
    return head_dim


def _dtype(config: dict[str, Any]) -> str:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    name = name.removeprefix("torch.") if isinstance(name, str) else name
    if name not in DTYPES:
        raise ConfigError(f"dtype = {name!r} is not supported (supported: {', '.join(DTYPES)})")
    return name


def _token_ids(config: dict[str, Any], field: str) -> tuple[int, ...]:
    value = config.get(field)
    values = [] if value is None else value if isinstance(value, list | tuple) else [value]
    for item in values:
        if not isinstance(item, int) or isinstance(item, bool) or item < 0:
            raise ConfigError(f"{field} = {value!r}: expected a token id or a list of them")
    return tuple(values)


def _size(config: dict[str, Any], field: str, default: int | None = None) -> int:
    value = config.get(field)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"{field} is missing from the configuration")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{field} = {value!r}: expected a positive integer")
    return value


def _positive(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{field} = {value!r}: expected a positive number")
    return float(value)


def _flag(config: dict[str, Any], field: str) -> bool:
    value = config.get(field)
    if value not in (None, True, False):
        raise ConfigError(f"{field} = {value!r}: expected true or false")
    return bool(value)
