"""EAGLE-3 draft head (arXiv 2503.01840): fused features of three target layers, own norms, a reduced vocabulary."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from specjax.config import ModelConfig
from specjax.errors import CheckpointError
from specjax.models import layers as nn
from specjax.models import llama
from specjax.models.cache import KVCache
from specjax.quant.dense_linear import Linear


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
    ):
        self.self_attn, self.mlp = self_attn, mlp
        self.input_layernorm, self.hidden_norm = input_layernorm, hidden_norm
        self.post_attention_layernorm = post_attention_layernorm

    def __call__(self, embedded, hidden, block, rope, keys, values):
        """Returns (output [B, T, D], keys, values)."""
        x = jnp.concatenate([self.input_layernorm(embedded), self.hidden_norm(hidden)], axis=-1)
        attended, keys, values = self.self_attn(x, block, rope, keys, values)
        x = hidden + attended
        return x + self.mlp(self.post_attention_layernorm(x)), keys, values


class Eagle3Head(nnx.Module):
    """Predicts the next fused feature; same calls as `specjax.models.eagle.EagleHead`.

    Attributes:
        needs: the target layers whose inputs are fused: 2, L // 2 and L - 3 of L, unless the config names others.
        d2t: target id minus draft id of each draft token [U], or None for the full vocabulary.
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
    ):
        self.config, self.needs = config, needs
        self.fc, self.midlayer, self.norm, self.lm_head = fc, midlayer, norm, lm_head
        self.d2t = None if d2t is None else nnx.Variable(d2t)
        self.embed_tokens = embed_tokens

    @property
    def dtype(self):
        """Compute dtype."""
        return self.norm.weight.dtype

    def fuse(self, features: Float[Array, "... A"]) -> Float[Array, "... D"]:
        """One feature from the three layers side by side."""
        return self.fc(features)

    def __call__(
        self, hidden: Float[Array, "B T D"], block: nn.Block, cache: KVCache, target: llama.Llama
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """One pass: row t holds the fused feature of its position and, in `block.tokens`, the token after it."""
        table = target.model.embed_tokens if self.embed_tokens is None else self.embed_tokens
        embedded = table(block.tokens).astype(hidden.dtype)
        rope = nn.rope_tables(self.config.rope, self.config.head_dim, block.positions)
        kept = cache.keys[0], cache.values[0]
        x, keys, values = nn.shared(self.midlayer, embedded, hidden, block, rope, *kept)
        return x, KVCache(keys=(keys,), values=(values,))

    def logits(self, hidden: Float[Array, "... D"], target: llama.Llama) -> Float[Array, "... U"]:
        """Logits over the draft vocabulary; float32."""
        return self.lm_head(self.norm(hidden)).astype(jnp.float32)

    def target_ids(self, draft_ids: Int[Array, "..."]) -> Int[Array, "..."]:
        """Token ids of the target's vocabulary."""
        return draft_ids if self.d2t is None else draft_ids + self.d2t[...][draft_ids]


def build(checkpoint, dtype, *, layer_ids: tuple[int, ...], target_width: int, num_drafts: int):
    """Assembles a head from the tensors of the upstream layout (see `specjax.checkpoints.heads`).

    Args:
        layer_ids: target layers whose inputs are fused.
        target_width: hidden size of the target.
        num_drafts: size U of the draft vocabulary.
    """
    config, prefix = checkpoint.config, "midlayer"
    hidden, vocab = config.hidden_size, config.vocab_size
    layer = Eagle3Layer(
        llama.build_attention(checkpoint, f"{prefix}.self_attn", 2 * hidden, dtype),
        llama.build_mlp(checkpoint, f"{prefix}.mlp", dtype),
        input_layernorm=llama.build_norm(checkpoint, f"{prefix}.input_layernorm", dtype),
        hidden_norm=llama.build_norm(checkpoint, f"{prefix}.hidden_norm", dtype),
        post_attention_layernorm=llama.build_norm(
            checkpoint, f"{prefix}.post_attention_layernorm", dtype
        ),
    )
    embedding = None
    if checkpoint.has("embed_tokens.weight"):
        table = checkpoint.tensor("embed_tokens.weight", (vocab, hidden))
        embedding = nn.Embedding(jnp.asarray(table, dtype))
    fused = len(layer_ids) * target_width
    return Eagle3Head(
        config,
        layer_ids,
        llama.build_linear(checkpoint, "fc", hidden, fused, checkpoint.has("fc.bias"), dtype),
        layer,
        llama.build_norm(checkpoint, "norm", dtype),
        llama.build_linear(checkpoint, "lm_head", num_drafts, hidden, False, dtype),
        d2t=_draft_vocabulary(checkpoint, num_drafts),
        embed_tokens=embedding,
    )


def _draft_vocabulary(checkpoint, num_drafts: int) -> Int[Array, "U"] | None:
    """The offsets d2t, checked against the mask t2d; a head over the full vocabulary may lack both."""
    vocab, read = checkpoint.config.vocab_size, checkpoint.source.read
    if not checkpoint.has("d2t"):
        if num_drafts != vocab:
            raise CheckpointError(
                f"{checkpoint.path}: d2t is missing, but draft_vocab_size {num_drafts} is not the vocabulary's {vocab}"
            )
        return None
    offsets = np.asarray(read("d2t"))
    if offsets.shape != (num_drafts,):
        raise CheckpointError(
            f"{checkpoint.path}: d2t has shape {offsets.shape}, expected ({num_drafts},)"
        )
    ids = np.arange(num_drafts) + offsets
    if ids.min() < 0 or ids.max() >= vocab:
        raise CheckpointError(f"{checkpoint.path}: d2t points outside the vocabulary of {vocab}")
    if checkpoint.has("t2d") and not np.array_equal(np.flatnonzero(read("t2d")), ids):
        raise CheckpointError(f"{checkpoint.path}: d2t and t2d name different draft tokens")
    return jnp.asarray(offsets, jnp.int32)
