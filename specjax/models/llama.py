"""Llama, and the architectures that share its forward pass (Mistral without sliding window, Qwen2).

Attribute paths are the parameter names of Hugging Face checkpoints, so `model.layers.0.self_attn.q_proj` means the same
thing in a file, in a quantizer's log and in a debugger.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from specjax.config import ModelConfig
from specjax.errors import ConfigError
from specjax.models import cache as kv
from specjax.models import layers as nn
from specjax.models.layers import Block
from specjax.pallas import matmul_dense
from specjax.pallas.glue import api as glue
from specjax.pallas.glue import parts
from specjax.quant import view
from specjax.quant.dense_linear import Linear
from specjax.quant.linear import QuantizedLinear


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ForwardOutput:
    """What one pass over a block yields.

    Attributes:
        hidden: output of the final norm, one row per token of the block.
        captured: residual stream entering each layer that the caller named, in that order.
        cache: the cache with the block's rows written.
    """

    hidden: Float[Array, "B T D"]
    captured: tuple[Float[Array, "B T D"], ...]
    cache: kv.KVCache


class LlamaModel(nnx.Module):
    """Embedding, decoder layers and final norm."""

    def __init__(self, embed_tokens: nn.Embedding, layers: list, norm: nn.RMSNorm):
        self.embed_tokens = embed_tokens
        self.layers = nnx.List(layers)
        self.norm = norm


class Llama(nnx.Module):
    """A causal language model.

    `lm_head` is None when the output head is the embedding. `depth` decides which layers each token runs through (see
    `specjax.depth.routed.Routed`); None is all of them, as where `config.depth` is None.
    """

    def __init__(self, config: ModelConfig, model: LlamaModel, lm_head=None, depth=None):
        if (config.depth is None) != (depth is None):
            raise ConfigError(
                f"config.depth={config.depth!r} with depth={depth!r}: a model has both or neither"
            )
        self.config = config
        self.model = model
        self.lm_head = lm_head
        self.depth = depth

    @property
    def dtype(self):
        """Compute dtype."""
        return self.model.embed_tokens.weight.dtype

    def __call__(
        self, block: Block, cache: kv.KVCache, capture: tuple[int, ...] = ()
    ) -> ForwardOutput:
        """Runs all layers over a block of tokens; `capture` names layers whose input the caller wants."""
        if self.depth is not None:
            return self.depth.run(self, block, cache, capture)
        rope = nn.rope_tables(self.config.rope, self.config.head_dim, block.positions)
        x = self.model.embed_tokens(block.tokens)
        keys, values, captured, added = [], [], {}, None
        for index, layer in enumerate(self.model.layers):
            if index in capture:
                captured[index] = x if added is None else x + parts.value(added)
            arguments = block, rope, cache.keys[index], cache.values[index]
            x, added, k, v = nn.shared_residual(layer, x, added, *arguments)
            keys.append(k)
            values.append(v)
        return ForwardOutput(
            hidden=glue.residual_norm(x, added, self.model.norm)[1],
            captured=tuple(captured[index] for index in capture),
            cache=kv.KVCache(keys=tuple(keys), values=tuple(values)),
        )

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Output head on final-norm rows; float32."""
        if self.lm_head is None:
            table = self.model.embed_tokens.weight[...]
            return matmul_dense.matmul(hidden, table, jnp.float32)
        return self.lm_head(hidden).astype(jnp.float32)

    def output_weight(self) -> Float[Array, "V D"]:
        """The output head's matrix in the compute dtype; dequantized if it has codes.

        Raises:
            ConfigError: see `dense_weight`.
        """
        if self.lm_head is None:
            return self.model.embed_tokens.weight[...]
        return dense_weight(self.lm_head, self.dtype)

    def with_scheme(self, scheme: str) -> "Llama":
        """The same weights under another activation scheme; no array is copied (see `specjax.quant.view`).

        Raises:
            ConfigError: the model holds no codes that the scheme can read.
        """
        return view.with_scheme(self, scheme)


def full_logits(model: Llama, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Logits of every position of a batch of equally long sequences, in one pass without an outside cache."""
    batch, length = tokens.shape
    cache = kv.init(model.config, batch, length, model.dtype)
    block = nn.causal_block(tokens, jnp.zeros((batch,), jnp.int32))
    return model.logits(model(block, cache).hidden)


def dense_weight(linear, dtype) -> Float[Array, "N K"]:
    """The matrix of a linear, dequantized if it has codes.

    Raises:
        ConfigError: its form has none (projected in a rotated basis, or packed for kernels).
    """
    if isinstance(linear, Linear):
        return linear.weight[...].astype(dtype)
    if not isinstance(linear, QuantizedLinear):
        raise ConfigError(
            f"a draft head needs an output head that is one matrix, not {type(linear).__name__}; "
            "load the target with dequantize='load'"
        )
    return linear.dequantize(dtype)


def build(
    checkpoint, dtype, finish: Callable[[nn.DecoderLayer], nn.DecoderLayer] | None = None
) -> Llama:
    """Assembles the model from a `specjax.checkpoints.base.Checkpoint`, pulling one parameter after the other.

    Its depth is full; `specjax.depth.build` adds the routers of a checkpoint that has them.

    Args:
        checkpoint: source of named tensors and linears; it checks shapes and raises errors that name the tensor.
        dtype: compute dtype; dense parameters are stored in it, quantized ones keep their own codes and scales.
        finish: what to do with each layer once it is read; the layer as read is dropped before the next one.
    """
    finish = finish or (lambda layer: layer)
    config = replace(checkpoint.config, depth=None)
    hidden, vocab = config.hidden_size, config.vocab_size
    table = checkpoint.tensor("model.embed_tokens.weight", (vocab, hidden))
    embedding = nn.Embedding(jnp.asarray(table, dtype))
    layers = [
        _uploaded(finish(build_layer(checkpoint, i, dtype))) for i in range(config.num_layers)
    ]
    model = LlamaModel(embedding, layers, build_norm(checkpoint, "model.norm", dtype))
    head = None
    if not config.tie_word_embeddings:
        head = _uploaded(build_linear(checkpoint, "lm_head", vocab, hidden, False, dtype))
    return Llama(config, model, head)


def _uploaded[Module](module: Module) -> Module:
    """Waits, so that what is under way, and with it the memory of a load, stays within one layer."""

    def upload(array):
        return jax.device_put(array) if isinstance(array, np.ndarray) else array

    return jax.block_until_ready(jax.tree.map(upload, module))


def build_layer(checkpoint, index: int, dtype) -> nn.DecoderLayer:
    """One decoder layer, from the tensors below `model.layers.<index>`."""
    config, prefix = checkpoint.config, f"model.layers.{index}"
    return nn.DecoderLayer(
        self_attn=build_attention(checkpoint, f"{prefix}.self_attn", config.hidden_size, dtype),
        mlp=build_mlp(checkpoint, f"{prefix}.mlp", dtype),
        input_layernorm=build_norm(checkpoint, f"{prefix}.input_layernorm", dtype),
        post_attention_layernorm=build_norm(
            checkpoint, f"{prefix}.post_attention_layernorm", dtype
        ),
    )


def build_attention(checkpoint, prefix: str, in_features: int, dtype) -> nn.Attention:
    """Attention with HF names below `prefix`; `in_features` is the width of the q, k and v inputs."""
    config = checkpoint.config
    width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def linear(name, out, inp, bias):
        return build_linear(checkpoint, f"{prefix}.{name}", out, inp, bias, dtype)

    return nn.Attention(
        config,
        q_proj=linear("q_proj", width, in_features, config.qkv_bias),
        k_proj=linear("k_proj", kv_width, in_features, config.qkv_bias),
        v_proj=linear("v_proj", kv_width, in_features, config.qkv_bias),
        o_proj=linear("o_proj", config.hidden_size, width, config.o_bias),
    )


def build_mlp(checkpoint, prefix: str, dtype) -> nn.MLP:
    """SwiGLU block with HF names below `prefix`."""
    config = checkpoint.config
    ffn, hidden = config.intermediate_size, config.hidden_size

    def linear(name, out, inp):
        return build_linear(checkpoint, f"{prefix}.{name}", out, inp, config.mlp_bias, dtype)

    return nn.MLP(
        gate_proj=linear("gate_proj", ffn, hidden),
        up_proj=linear("up_proj", ffn, hidden),
        down_proj=linear("down_proj", hidden, ffn),
    )


def build_norm(checkpoint, name: str, dtype) -> nn.RMSNorm:
    """A norm from `<name>.weight`; the gain is kept in the compute dtype."""
    config = checkpoint.config
    gain = checkpoint.tensor(f"{name}.weight", (config.hidden_size,))
    return nn.RMSNorm(jnp.asarray(gain, dtype), config.rms_norm_eps)


def build_linear(checkpoint, prefix: str, out_features: int, in_features: int, bias: bool, dtype):
    """A linear by HF prefix: dense ones are cast to the compute dtype, quantized ones kept as they are."""
    linear = checkpoint.linear(prefix, out_features, in_features, bias)
    if not isinstance(linear, Linear):
        return linear
    bias_values = None if linear.bias is None else jnp.asarray(linear.bias[...], dtype)
    return Linear(jnp.asarray(linear.weight[...], dtype), bias_values)
