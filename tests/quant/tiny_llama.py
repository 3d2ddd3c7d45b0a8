"""Small random Llamas for quantizer tests: activations with outlier features, grouped-query attention."""

import jax
import jax.numpy as jnp
import numpy as np

from specjax.config import ModelConfig, RopeConfig
from specjax.models import layers as nn
from specjax.models.llama import Llama, LlamaModel
from specjax.quant.dense_linear import Linear

VOCAB = 96


def make_config(**changes) -> ModelConfig:
    """Hidden 64, 4 heads over 2, feed-forward 96, two layers."""
    fields = dict(
        architecture="LlamaForCausalLM",
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_word_embeddings=True,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_ids=(1,),
        dtype="float16",
    )
    return ModelConfig(**(fields | changes))


def make(seed: int = 0, **changes) -> Llama:
    """A random float32 model of `make_config(**changes)`; norm gains have a few large entries."""
    config = make_config(**changes)
    generator = np.random.default_rng(seed)

    def array(*shape):
        scale = 0.5 * shape[-1] ** -0.5
        return jnp.asarray(scale * generator.standard_normal(shape), jnp.float32)

    def linear(rows, columns, bias):
        return Linear(array(rows, columns), array(rows) if bias else None)

    def norm():
        gain = generator.uniform(0.5, 1.5, config.hidden_size)
        gain[generator.integers(0, config.hidden_size, 3)] *= 6
        return nn.RMSNorm(jnp.asarray(gain, jnp.float32), config.rms_norm_eps)

    width, kv_width = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    hidden, ffn = config.hidden_size, config.intermediate_size

    def layer():
        attention = nn.Attention(
            config,
            o_proj=linear(hidden, width, config.o_bias),
            q_proj=linear(width, hidden, config.qkv_bias),
            k_proj=linear(kv_width, hidden, config.qkv_bias),
            v_proj=linear(kv_width, hidden, config.qkv_bias),
        )
        mlp = nn.MLP(
            down_proj=linear(hidden, ffn, config.mlp_bias),
            gate_proj=linear(ffn, hidden, config.mlp_bias),
            up_proj=linear(ffn, hidden, config.mlp_bias),
        )
        return nn.DecoderLayer(attention, mlp, norm(), norm())

    layers = [layer() for _ in range(config.num_layers)]
    head = None if config.tie_word_embeddings else linear(config.vocab_size, hidden, False)
    embedding = nn.Embedding(array(config.vocab_size, hidden) * 2 * hidden**0.5)
    return Llama(config, LlamaModel(embedding, layers, norm()), head)


def tokens(count: int, length: int, seed: int = 0) -> np.ndarray:
    """Random windows of token ids."""
    return np.random.default_rng(seed).integers(0, VOCAB, (count, length), np.int32)


def relative(found: jax.Array, expected: jax.Array) -> float:
    """RMS of the difference relative to the RMS of what is expected."""
    return float(jnp.sqrt(jnp.mean((found - expected) ** 2) / jnp.mean(expected**2)))
