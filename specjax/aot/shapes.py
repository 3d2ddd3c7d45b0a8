"""Real models by shape: configurations, and run-time forms in which every array is abstract."""

from typing import Any

import jax
import jax.numpy as jnp

from specjax.config import ModelConfig, RopeConfig
from specjax.drafters.base import Drafter
from specjax.drafters.eagle import eagle
from specjax.drafters.ngram import Ngram
from specjax.drafters.none import NoDraft
from specjax.errors import ConfigError
from specjax.models import eagle as eagle_model
from specjax.models import llama
from specjax.models.llama import Llama
from specjax.models.prepare import prepare, with_backend
from specjax.quant import scheme as schemes
from specjax.quant.dense_linear import Linear
from specjax.quant.linear import QuantizedLinear
from specjax.quantize import shrink

_LLAMA3 = dict(
    architecture="LlamaForCausalLM",
    vocab_size=128256,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=5e5),
    tie_word_embeddings=False,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    max_position_embeddings=8192,
    bos_token_id=128000,
    eos_token_ids=(128001,),
    dtype="bfloat16",
)
CONFIGS: dict[str, ModelConfig] = {
    "llama3-8b": ModelConfig(
        **_LLAMA3,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
    ),
    "llama3-70b": ModelConfig(
        **_LLAMA3,
        hidden_size=8192,
        intermediate_size=28672,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
    ),
    "smollm2-135m": ModelConfig(
        **{
            **_LLAMA3,
            "vocab_size": 49152,
            "head_dim": 64,
            "rope": RopeConfig(theta=1e5),
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_ids": (2,),
        },
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
    ),
}


def lookup(name: str) -> ModelConfig:
    """The configuration of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in CONFIGS:
        raise ConfigError(f"model shape {name!r} is unknown; known: {', '.join(CONFIGS)}")
    return CONFIGS[name]


class ShapeCheckpoint:
    """A checkpoint of zeros: under `jax.eval_shape` nothing is allocated.

    Args:
        config: shapes.
        scheme: of the decoder layers' linears; None: dense. The output head is dense.
        group_size: input features that share a scale, -1: all.
        dtype: of dense parameters and scales.
    """

    format = "shapes"

    def __init__(self, config: ModelConfig, scheme: str | None, group_size: int, dtype):
        self.config, self.dtype, self.group_size = config, jnp.dtype(dtype), group_size
        self.scheme = None if scheme is None else schemes.lookup(scheme)

    def has(self, name: str) -> bool:
        """Optional tensors: none."""
        return False

    def tensor(self, name: str, shape: tuple[int, ...]):
        return jnp.zeros(shape, self.dtype)

    def linear(self, prefix: str, out_features: int, in_features: int, bias: bool):
        bias_values = jnp.zeros((out_features,), self.dtype) if bias else None
        if self.scheme is None or "layers." not in prefix:
            return Linear(jnp.zeros((out_features, in_features), self.dtype), bias_values)
        return quantized(
            self.scheme, out_features, in_features, self.group_size, self.dtype, bias_values
        )


def quantized(
    scheme, out_features: int, in_features: int, group_size: int, dtype, bias=None
) -> QuantizedLinear:
    """A quantized linear of zeros in the scheme's usual form."""
    spec = scheme.weights
    size = schemes.check_group_size(in_features, group_size)
    groups = in_features // size
    table = (out_features, groups)
    parts: dict[str, Any] = {"scales": jnp.zeros(table, dtype)}
    if spec.levels == "qqq" and groups > 1:
        parts["channel_scales"] = jnp.zeros((out_features,), jnp.float32)
    if spec.levels == "qoq" and groups > 1:
        parts = {
            "scales": jnp.zeros(table, jnp.int8),
            "zeros": jnp.zeros(table, jnp.int8),
            "channel_scales": jnp.zeros((out_features,), jnp.float32),
        }
    elif spec.levels == "qoq":
        parts["minima"] = jnp.zeros(table, dtype)
    elif not spec.symmetric:
        parts["zeros"] = jnp.zeros(table, jnp.int8)
    return QuantizedLinear(
        codes=jnp.zeros((out_features, in_features), spec.code_dtype),
        **parts,
        bias=bias,
        scheme=scheme,
        group_size=size,
    )


def model(config: ModelConfig, scheme: str | None, group_size: int, dtype, backend: str) -> Llama:
    """The run-time form of a model as abstract arrays, for `device.current()`.

    Args:
        scheme: None or "dense": not quantized.
    """
    scheme = None if scheme in (None, "dense") else scheme
    checkpoint = ShapeCheckpoint(config, scheme, group_size, dtype)
    return jax.eval_shape(lambda: prepare(llama.build(checkpoint, jnp.dtype(dtype)), backend))


def drafter(spec: dict[str, Any], checkpoint: ShapeCheckpoint, target: Llama) -> Drafter:
    """A drafter for a model of this shape: none, ngram, or eagle (EAGLE-1/2) with the options of the registry.

    A reduced vocabulary is the first `vocabulary_size` tokens. Under `jax.eval_shape` nothing is allocated.

    Raises:
        ConfigError: another kind.
    """
    options = {name: value for name, value in spec.items() if name != "kind"}
    if spec["kind"] == "none":
        return NoDraft()
    if spec["kind"] == "ngram":
        return Ngram(**options)
    if spec["kind"] != "eagle":
        raise ConfigError(
            f"drafter {spec['kind']!r} cannot be made from a shape; supported: none, ngram, eagle"
        )
    head = with_backend(eagle_model.build(checkpoint, target.dtype), target.backend)
    if options.get("vocabulary_size") is not None:
        ids = jnp.arange(options["vocabulary_size"], dtype=jnp.int32)
        head = shrink.with_vocabulary(head, target, ids)
    if options.get("scheme") is not None:
        head = shrink.quantized(head, target, options["scheme"])
    sizes = {"draft_depth": 6, "topk": 10, "num_nodes": 60}
    return eagle(head, **{name: options.get(name, size) for name, size in sizes.items()})


def abstract_drafter(spec: dict[str, Any], config: ModelConfig, target: Llama) -> Drafter:
    """`drafter` with abstract arrays, for an abstract target."""
    checkpoint = ShapeCheckpoint(config, None, -1, target.dtype)
    return jax.eval_shape(lambda target: drafter(spec, checkpoint, target), target)
