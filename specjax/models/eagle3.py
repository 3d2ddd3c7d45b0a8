"""EAGLE-3 draft head (arXiv 2503.01840) and its variants: fused features of target layers, own norms, a reduced
vocabulary."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from specjax.config import ModelConfig
from specjax.models import layers as nn
from specjax.models import llama
from specjax.models.cache import KVCache
from specjax.pallas.glue import parts
from specjax.quant.dense_linear import Linear


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What EAGLE-3 heads differ in, under the names of speculators' config.json.

    Attributes:
        norm_before_residual: the residual of the first layer is the normed feature.
        norm_before_fc: the target's features are normed together before they are fused.
        fc_norm: those of each target layer are normed by themselves (EAGLE-3.1).
        norm_output: the next step is fed the normed output.
    """

    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False


class Eagle3Layer(nnx.Module):
    """A decoder layer whose attention reads [normed embedding | normed feature] and whose residual is the feature."""

    def __init__(
        self,
        self_attn: nn.Attention,
        mlp: nn.MLP,
        *,
        input_layernorm: nn.RMSNorm,
        hidden_norm: nn.RMSNorm,
        post_attention_layernorm: nn.RMSNorm,
        norm_before_residual: bool = False,
    ):
        self.self_attn, self.mlp = self_attn, mlp
        self.input_layernorm, self.hidden_norm = input_layernorm, hidden_norm
        self.post_attention_layernorm = post_attention_layernorm
        self.norm_before_residual = norm_before_residual

    def __call__(self, embedded, hidden, block, rope, keys, values):
        """Returns (output [B, T, D], keys, values)."""
        normed = self.hidden_norm(hidden)
        x = jnp.concatenate([self.input_layernorm(embedded), normed], axis=-1)
        attended, keys, values = self.self_attn(x, block, rope, keys, values)
        x = (normed if self.norm_before_residual else hidden) + parts.value(attended)
        return x + parts.value(self.mlp(self.post_attention_layernorm(x))), keys, values


class Eagle3Head(nnx.Module):
    """Predicts the next fused feature; same calls as `specjax.models.eagle.EagleHead`.

    Attributes:
        needs: the states of the target that are fused: 2, L // 2 and L - 3 of L, unless the config names others.
        variant: which norms there are and what they feed.
        layers: ordinary decoder layers behind `midlayer`; often none.
        lm_head: own output head, or None: the target's.
        d2t: target id minus draft id of each draft token [U], or None for the full vocabulary.
        embed_tokens: own embeddings, or None: the target's.
        input_norm: of all features together, with `norm_before_fc`.
        fc_norm: one norm per state of the target, with `fc_norm`.
    """

    def __init__(
        self,
        config: ModelConfig,
        needs: tuple[int, ...],
        fc: Linear,
        midlayer: Eagle3Layer,
        norm: nn.RMSNorm,
        lm_head,
        d2t: Int[Array, "U"] | None = None,
        embed_tokens: nn.Embedding | None = None,
        *,
        variant: Variant = Variant(),
        layers: tuple[nn.DecoderLayer, ...] = (),
        input_norm: nn.RMSNorm | None = None,
        fc_norm: tuple[nn.RMSNorm, ...] = (),
    ):
        self.config, self.needs, self.variant = config, needs, variant
        self.fc, self.midlayer, self.norm, self.lm_head = fc, midlayer, norm, lm_head
        self.d2t = None if d2t is None else nnx.Variable(d2t)
        self.embed_tokens, self.layers = embed_tokens, nnx.List(layers)
        self.input_norm, self.fc_norm = input_norm, nnx.List(fc_norm)

    @property
    def num_layers(self) -> int:
        """Layers of its cache."""
        return 1 + len(self.layers)

    @property
    def dtype(self):
        """Compute dtype."""
        return self.norm.weight.dtype

    def fuse(self, features: Float[Array, "... A"]) -> Float[Array, "... D"]:
        """One feature from those of the target's layers side by side."""
        if self.input_norm is not None:
            features = self.input_norm(features)
        if len(self.fc_norm):
            each = jnp.split(features, len(self.fc_norm), axis=-1)
            normed = [norm(x) for norm, x in zip(self.fc_norm, each, strict=True)]
            features = jnp.concatenate(normed, axis=-1)
        return self.fc(features)

    def __call__(
        self, hidden: Float[Array, "B T D"], block: nn.Block, cache: KVCache, target: llama.Llama
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """One pass: row t holds the fused feature of its position and, in `block.tokens`, the token after it."""
        table = target.model.embed_tokens if self.embed_tokens is None else self.embed_tokens
        embedded = table(block.tokens).astype(hidden.dtype)
        rope = nn.rope_tables(self.config.rope, self.config.head_dim, block.positions, block.length)
        kept = cache.keys[0], cache.values[0]
        x, *written = nn.shared(self.midlayer, embedded, hidden, block, rope, *kept)
        keys, values = [written[0]], [written[1]]
        for layer, *kept in zip(self.layers, cache.keys[1:], cache.values[1:], strict=True):
            x, *written = nn.shared(layer, x, block, rope, *kept)
            keys.append(written[0])
            values.append(written[1])
        x = self.norm(x) if self.variant.norm_output else x
        return x, KVCache(keys=tuple(keys), values=tuple(values))

    def logits(self, hidden: Float[Array, "... D"], target: llama.Llama) -> Float[Array, "... U"]:
        """Logits over the draft vocabulary; float32."""
        normed = hidden if self.variant.norm_output else self.norm(hidden)
        if self.lm_head is None:
            return target.logits(normed)
        return self.lm_head(normed).astype(jnp.float32)

    def target_ids(self, draft_ids: Int[Array, "..."]) -> Int[Array, "..."]:
        """Token ids of the target's vocabulary."""
        return draft_ids if self.d2t is None else draft_ids + self.d2t[...][draft_ids]


def build(
    checkpoint,
    dtype,
    *,
    layer_ids: tuple[int, ...],
    target_width: int,
    num_drafts: int,
    d2t: Int[Array, "U"] | None = None,
    variant: Variant = Variant(),
    own_head: bool = True,
) -> Eagle3Head:
    """Assembles a head from tensors under speculators' names.

    Args:
        layer_ids: states of the target that are fused.
        target_width: hidden size of the target.
        num_drafts: size U of the draft vocabulary.
        d2t: see `Eagle3Head`.
        own_head: the file has an output head; else the target's is used.
    """
    config = checkpoint.config
    hidden, vocab, fused = config.hidden_size, config.vocab_size, len(layer_ids) * target_width
    embedding, input_norm, fc_norm, lm_head = None, None, (), None
    if checkpoint.has("embed_tokens.weight"):
        table = checkpoint.tensor("embed_tokens.weight", (vocab, hidden))
        embedding = nn.Embedding(jnp.asarray(table, dtype))
    if variant.norm_before_fc:
        input_norm = llama.build_norm(checkpoint, "input_norm", dtype, fused)
    if variant.fc_norm:
        names = [f"fc_norm.{j}" for j in range(len(layer_ids))]
        fc_norm = tuple(llama.build_norm(checkpoint, n, dtype, target_width) for n in names)
    if own_head:
        lm_head = llama.build_linear(checkpoint, "lm_head", num_drafts, hidden, False, dtype)
    more = range(1, config.num_layers)
    return Eagle3Head(
        config,
        layer_ids,
        llama.build_linear(checkpoint, "fc", hidden, fused, checkpoint.has("fc.bias"), dtype),
        _build_first(checkpoint, dtype, variant),
        llama.build_norm(checkpoint, "norm", dtype),
        lm_head,
        d2t=d2t,
        embed_tokens=embedding,
        variant=variant,
        layers=tuple(llama.build_layer(checkpoint, i, dtype, f"layers.{i}") for i in more),
        input_norm=input_norm,
        fc_norm=fc_norm,
    )


def _build_first(checkpoint, dtype, variant: Variant) -> Eagle3Layer:
    """The layer that reads the embeddings."""
    config, prefix = checkpoint.config, "layers.0"
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    return Eagle3Layer(
        llama.build_attention(
            *(checkpoint, f"{prefix}.self_attn", 2 * config.hidden_size, dtype),
            config.layer_kind(0),
        ),
        llama.build_mlp(checkpoint, f"{prefix}.mlp", dtype),
        norm_before_residual=variant.norm_before_residual,
        **{n: llama.build_norm(checkpoint, f"{prefix}.{n}", dtype) for n in norms},
    )
