"""Untrained draft heads of a target's shape."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from specjax.config import ModelConfig
from specjax.errors import ConfigError
from specjax.models import eagle, eagle3, layers, medusa
from specjax.models.llama import Llama

KINDS = ("eagle", "eagle3", "medusa")
_STANDARD_DEVIATION = 0.02


def head_config(target: ModelConfig) -> ModelConfig:
    """Configuration of an EAGLE head: one layer of the target's shape."""
    return dataclasses.replace(
        target,
        num_layers=1,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
    )


def eagle_head(target: Llama, key: Array) -> eagle.EagleHead:
    """An EAGLE-1/2 head that starts by handing the feature on: its layer adds little at first."""
    config = head_config(target.config)
    make, hidden = _Maker(key), config.hidden_size
    fc = make.linear(hidden, 2 * hidden)
    fc.weight[...] = fc.weight[...].at[:, hidden:].add(jnp.eye(hidden))
    layer = layers.DecoderLayer(
        make.attention(config, hidden), make.mlp(config), None, make.norm(config)
    )
    return eagle.EagleHead(config, fc, layer)


def eagle3_head(
    target: Llama, key: Array, ids: Int[Array, "U"], layer_ids: tuple[int, ...] | None = None
) -> eagle3.Eagle3Head:
    """An EAGLE-3 head over the draft vocabulary `ids`, whose rows of the output head are the target's at first.

    Raises:
        ConfigError: the target has too few layers for the default choice.
    """
    count = target.config.num_layers
    if layer_ids is None and count < 7:
        raise ConfigError(f"the target has {count} layers; the default EAGLE-3 features need 7")
    config = head_config(target.config)
    make, hidden = _Maker(key), config.hidden_size
    layer = eagle3.Eagle3Layer(
        make.attention(config, 2 * hidden),
        make.mlp(config),
        input_layernorm=make.norm(config),
        hidden_norm=make.norm(config),
        post_attention_layernorm=make.norm(config),
    )
    needs = layer_ids or (2, count // 2, count - 3)
    return eagle3.Eagle3Head(
        config,
        needs,
        make.linear(hidden, len(needs) * hidden),
        layer,
        make.norm(config),
        layers.Linear(target.output_weight()[ids].astype(jnp.float32)),
        d2t=(ids - jnp.arange(len(ids))).astype(jnp.int32),
    )


def medusa_heads(target: Llama, num_heads: int) -> medusa.MedusaHeads:
    """Medusa-1 heads that predict what the target predicts for the next token, as upstream starts them."""
    hidden, output = target.config.hidden_size, target.output_weight().astype(jnp.float32)

    def head() -> medusa.MedusaHead:
        linear = layers.Linear(jnp.zeros((hidden, hidden)), jnp.zeros((hidden,)))
        return medusa.MedusaHead(linear, layers.Linear(jnp.copy(output)))

    return medusa.MedusaHeads([head() for _ in range(num_heads)])


class _Maker:
    """Random float32 layers, a new key for each."""

    def __init__(self, key: Array):
        self._key = key

    def linear(self, out_features: int, in_features: int) -> layers.Linear:
        self._key, key = jax.random.split(self._key)
        shape = (out_features, in_features)
        return layers.Linear(_STANDARD_DEVIATION * jax.random.normal(key, shape, jnp.float32))

    def norm(self, config: ModelConfig) -> layers.RMSNorm:
        return layers.RMSNorm(jnp.ones((config.hidden_size,), jnp.float32), config.rms_norm_eps)

    def attention(self, config: ModelConfig, in_features: int) -> layers.Attention:
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        return layers.Attention(
            config,
            q_proj=self.linear(width, in_features),
            k_proj=self.linear(kv_width, in_features),
            v_proj=self.linear(kv_width, in_features),
            o_proj=self.linear(config.hidden_size, width),
        )

    def mlp(self, config: ModelConfig) -> layers.MLP:
        hidden, inner = config.hidden_size, config.intermediate_size
        return layers.MLP(
            gate_proj=self.linear(inner, hidden),
            up_proj=self.linear(inner, hidden),
            down_proj=self.linear(hidden, inner),
        )
