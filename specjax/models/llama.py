"""Decoders: Llama, and what other architectures do differently by settings of `ModelConfig`.

Attribute paths are the parameter names of Hugging Face's Llama checkpoints, so `model.layers.0.self_attn.q_proj` means
the same thing in a file, in a quantizer's log and in a debugger; where files of an architecture have other names, its
declaration in `specjax.config.architectures` says so.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from specjax.config import LayerKind, ModelConfig
from specjax.errors import ConfigError
from specjax.models import cache as kv
from specjax.models import layers as nn
from specjax.models.layers import Block
from specjax.models.norms import LayerNorm, Norm
from specjax.pallas import dispatch, matmul_dense
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
        captured: residual stream entering each layer that the caller named, in that order; the number of layers names
            what leaves the last one, before the final norm.
        cache: the cache with the block's rows written.
    """

    hidden: Float[Array, "B T D"]
    captured: tuple[Float[Array, "B T D"], ...]
    cache: kv.KVCache


class LlamaModel(nnx.Module):
    """Embedding, decoder layers and final norm; `embed_positions` where positions are learned."""

    def __init__(
        self,
        embed_tokens: nn.Embedding,
        layers: list,
        norm: Norm,
        embed_positions: nn.Embedding | None = None,
    ):
        self.embed_tokens = embed_tokens
        self.layers = nnx.List(layers)
        self.norm = norm
        self.embed_positions = embed_positions

    def having(self, **changes) -> "LlamaModel":
        """The same model with other parts; those that are not named stay."""
        kept = {
            "embed_tokens": self.embed_tokens,
            "layers": list(self.layers),
            "norm": self.norm,
            "embed_positions": self.embed_positions,
        }
        return LlamaModel(**(kept | changes))


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

    @property
    def backend(self) -> dispatch.Backend:
        """What runs attention, and what stands between products."""
        return self.model.layers[0].self_attn.backend

    def embed(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """What enters the first layer."""
        x = self.model.embed_tokens(tokens)
        if self.config.embedding_multiplier != 1:
            # Rounded to the compute dtype first, as Gemma was trained.
            x = x * jnp.asarray(self.config.embedding_multiplier, x.dtype)
        if self.model.embed_positions is not None:
            # Rows that count for nothing may stand beyond the last position; what they write must be finite.
            last = self.config.max_position_embeddings - 1
            x = x + self.model.embed_positions(jnp.minimum(positions, last))
        return x

    def __call__(
        self, block: Block, cache: kv.KVCache, capture: tuple[int, ...] = ()
    ) -> ForwardOutput:
        """Runs all layers over a block of tokens; `capture` names layers whose input the caller wants (see
        `ForwardOutput.captured`)."""
        if self.depth is not None:
            return self.depth.run(self, block, cache, capture)
        tables = nn.position_tables(self.config, block)
        x = self.embed(block.tokens, block.positions)
        keys, values, captured, added = [], [], {}, None
        for index, layer in enumerate(self.model.layers):
            if index in capture:
                captured[index] = x if added is None else x + parts.value(added)
            arguments = block, nn.tables_of(layer, tables), cache.keys[index], cache.values[index]
            x, added, k, v = nn.shared_residual(layer, x, added, *arguments)
            keys.append(k)
            values.append(v)
        captured[len(self.model.layers)], hidden = glue.residual_norm(
            x, added, self.model.norm, self.backend
        )
        return ForwardOutput(
            hidden=hidden,
            captured=tuple(captured[index] for index in capture),
            cache=kv.KVCache(keys=tuple(keys), values=tuple(values)),
        )

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Output head on final-norm rows; float32."""
        if self.lm_head is None:
            table = self.model.embed_tokens.weight[...]
            logits = matmul_dense.matmul(hidden, table, jnp.float32)
        else:
            logits = self.lm_head(hidden).astype(jnp.float32)
        if self.config.logits_divisor != 1:
            logits = logits / self.config.logits_divisor
        if (cap := self.config.logit_softcap) is not None:
            logits = cap * jnp.tanh(logits / cap)
        return logits

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
    start = jnp.zeros((batch,), jnp.int32)
    block = nn.causal_block(tokens, start, start + length)
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
    positions = None
    if config.learned_positions:
        shape = (config.max_position_embeddings, hidden)
        rows = checkpoint.tensor("model.embed_positions.weight", shape)
        positions = nn.Embedding(jnp.asarray(rows, dtype))
    layers = [
        _uploaded(finish(build_layer(checkpoint, i, dtype))) for i in range(config.num_layers)
    ]
    model = LlamaModel(embedding, layers, build_norm(checkpoint, "model.norm", dtype), positions)
    head = None
    if not config.tie_word_embeddings:
        head = _uploaded(build_linear(checkpoint, "lm_head", vocab, hidden, False, dtype))
    return Llama(config, model, head)


def _uploaded[Module](module: Module) -> Module:
    """Waits, so that what is under way, and with it the memory of a load, stays within one layer."""

    def upload(array):
        return jax.device_put(array) if isinstance(array, np.ndarray) else array

    return jax.block_until_ready(jax.tree.map(upload, module))


def build_layer(checkpoint, index: int, dtype, prefix: str | None = None) -> nn.DecoderLayer:
    """One decoder layer, from the tensors below `prefix`, by default `model.layers.<index>`."""
    config, prefix = checkpoint.config, prefix or f"model.layers.{index}"
    before, after = config.norm_placement != "after", config.norm_placement != "before"

    def norm(name: str, present: bool) -> Norm | None:
        return build_norm(checkpoint, f"{prefix}.{name}", dtype) if present else None

    return nn.DecoderLayer(
        self_attn=build_attention(
            checkpoint, f"{prefix}.self_attn", config.hidden_size, dtype, config.layer_kind(index)
        ),
        mlp=build_mlp(checkpoint, f"{prefix}.mlp", dtype),
        input_layernorm=norm("input_layernorm", before),
        post_attention_layernorm=norm("post_attention_layernorm", before),
        attention_output_norm=norm("attention_output_norm", after),
        mlp_output_norm=norm("mlp_output_norm", after),
    )


def build_attention(
    checkpoint, prefix: str, in_features: int, dtype, kind: LayerKind = nn.PLAIN
) -> nn.Attention:
    """Attention with HF names below `prefix`; `in_features` is the width of the q, k and v inputs."""
    config = checkpoint.config
    width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def linear(name, out, inp):
        bias = config.has_bias(name)
        return build_linear(checkpoint, f"{prefix}.{name}", out, inp, bias, dtype)

    norms = {}
    if config.qk_norm is not None:
        per_head = config.qk_norm == "head"
        for name, size in (("q_norm", width), ("k_norm", kv_width)):
            size = config.head_dim if per_head else size
            norms[name] = build_norm(checkpoint, f"{prefix}.{name}", dtype, size)
    return nn.Attention(
        config,
        q_proj=linear("q_proj", width, in_features),
        k_proj=linear("k_proj", kv_width, in_features),
        v_proj=linear("v_proj", kv_width, in_features),
        o_proj=linear("o_proj", config.hidden_size, width),
        kind=kind,
        **norms,
    )


def build_mlp(checkpoint, prefix: str, dtype) -> nn.MLP:
    """Feed-forward with HF names below `prefix`."""
    config = checkpoint.config
    ffn, hidden = config.intermediate_size, config.hidden_size

    def linear(name, out, inp):
        bias = config.has_bias(name)
        return build_linear(checkpoint, f"{prefix}.{name}", out, inp, bias, dtype)

    gate = {"gate_proj": linear("gate_proj", ffn, hidden)} if config.gated_mlp else {}
    return nn.MLP(
        **gate,
        up_proj=linear("up_proj", ffn, hidden),
        down_proj=linear("down_proj", hidden, ffn),
        activation=config.hidden_act,
    )


def build_norm(checkpoint, name: str, dtype, size: int | None = None) -> Norm:
    """A norm from `<name>.weight` (and `<name>.bias`), in the compute dtype; `size` None is the model's width."""
    config = checkpoint.config
    shape = (config.hidden_size if size is None else size,)
    weight = jnp.asarray(checkpoint.tensor(f"{name}.weight", shape), dtype)
    if config.norm_kind == "layer":
        bias = jnp.asarray(checkpoint.tensor(f"{name}.bias", shape), dtype)
        return LayerNorm(weight, bias, config.rms_norm_eps)
    return nn.RMSNorm(weight, config.rms_norm_eps, offset=config.norm_offset)


def build_linear(checkpoint, prefix: str, out_features: int, in_features: int, bias: bool, dtype):
    """A linear by HF prefix: dense ones are cast to the compute dtype, quantized ones kept as they are."""
    linear = checkpoint.linear(prefix, out_features, in_features, bias)
    if not isinstance(linear, Linear):
        return linear
    bias_values = None if linear.bias is None else jnp.asarray(linear.bias[...], dtype)
    return Linear(jnp.asarray(linear.weight[...], dtype), bias_values)
