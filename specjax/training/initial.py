"""Untrained draft heads of a target's shape."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax.config import ModelConfig, RopeConfig
from specjax.errors import ConfigError
from specjax.models import eagle, eagle3, layers, medusa
from specjax.models.llama import Llama
from specjax.quant.dense_linear import Linear

KINDS = ("eagle", "eagle3", "medusa")
_STANDARD_DEVIATION = 0.02
# Of `fit_linear`, relative to the mean square of the inputs.
_RIDGE = 3e-3


def head_config(target: ModelConfig) -> ModelConfig:
    """Configuration of an EAGLE head: one layer of the target's shape."""
    whole = target.rope.rotary_fraction == 1 and not target.rope.interleaved
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        num_layers=1,
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        rms_norm_eps=target.rms_norm_eps,
        rope=target.rope if whole else RopeConfig(theta=target.rope.theta),
        tie_word_embeddings=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        max_position_embeddings=target.max_position_embeddings,
        bos_token_id=target.bos_token_id,
        eos_token_ids=target.eos_token_ids,
        dtype=target.dtype,
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


def fit_linear(
    head: eagle.EagleHead, target: Llama, examples: Sequence, store, max_tokens: int = 200_000
) -> None:
    """Makes an EAGLE-1/2 head the linear map that best predicts the target's next feature.

    `fc` becomes the ridge regression of the next feature on [embedding of the next token | feature], which training
    otherwise spends its first hundreds of steps on; the layer's output projections become zero, so that the head starts
    as this map.

    Args:
        examples: `specjax.training.text.Example`s.
        store: their features, see `specjax.training.features.FeatureStore`.
        max_tokens: enough of the text.
    """
    table = np.asarray(target.model.embed_tokens.weight[...], np.float32)
    size = 2 * table.shape[1]
    gram, moment, seen = np.zeros((size, size)), np.zeros((size, size // 2)), 0
    for index, example in enumerate(examples):
        features = store.rows(index)[1].astype(np.float32)
        inputs = np.concatenate([table[example.tokens[1:]], features[:-1]], axis=1)
        gram += inputs.T @ inputs
        moment += inputs.T @ features[1:]
        seen += len(inputs)
        if seen >= max_tokens:
            break
    head.fc.weight[...] = jnp.asarray(_ridge(gram, moment).T, jnp.float32)
    layer = head.layers[0]
    for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
        projection.weight[...] = jnp.zeros_like(projection.weight[...])


def _ridge(gram: Float[np.ndarray, "I I"], moment: Float[np.ndarray, "I O"]) -> np.ndarray:
    """Solution of the regularized normal equations [I, O]."""
    penalty = _RIDGE * np.trace(gram) / len(gram)
    return np.linalg.solve(gram + penalty * np.eye(len(gram)), moment)


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
        Linear(target.output_weight()[ids].astype(jnp.float32)),
        d2t=(ids - jnp.arange(len(ids))).astype(jnp.int32),
    )


def medusa_heads(target: Llama, num_heads: int) -> medusa.MedusaHeads:
    """Medusa-1 heads that predict what the target predicts for the next token, as upstream starts them."""
    hidden, output = target.config.hidden_size, target.output_weight().astype(jnp.float32)

    def head() -> medusa.MedusaHead:
        linear = Linear(jnp.zeros((hidden, hidden)), jnp.zeros((hidden,)))
        return medusa.MedusaHead(linear, Linear(jnp.copy(output)))

    return medusa.MedusaHeads([head() for _ in range(num_heads)])


class _Maker:
    """Random float32 layers, a new key for each."""

    def __init__(self, key: Array):
        self._key = key

    def linear(self, out_features: int, in_features: int) -> Linear:
        self._key, key = jax.random.split(self._key)
        shape = (out_features, in_features)
        return Linear(_STANDARD_DEVIATION * jax.random.normal(key, shape, jnp.float32))

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
