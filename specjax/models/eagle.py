"""EAGLE-1/2 draft head (arXiv 2401.15077, 2406.16858): one decoder layer that predicts the target's next feature."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from specjax.config import ModelConfig
from specjax.models import layers as nn
from specjax.models import llama
from specjax.models.cache import KVCache
from specjax.quant.dense_linear import Linear


class EagleHead(nnx.Module):
    """Predicts the final-norm feature at position p + 1 from the one at p and the token at p + 1.

    `fc` joins [embedding | feature]; the layer has no input norm and the head no final norm. Embedding and output head
    are the target's, unless the head brings its own, as one for a rotated target must; `rotation` [D, D] then takes the
    target's features into the basis that the head was trained in: feature @ rotation^T. With `draft_ids` [U] the head's
    output head has a row for each of these target tokens only.
    """

    needs = "final"

    def __init__(
        self,
        config: ModelConfig,
        fc: Linear,
        layer: nn.DecoderLayer,
        embed_tokens: nn.Embedding | None = None,
        lm_head=None,
        rotation: Linear | None = None,
        draft_ids: Int[Array, "U"] | None = None,
    ):
        self.config = config
        self.fc = fc
        self.layers = nnx.List([layer])
        self.embed_tokens, self.lm_head, self.rotation = embed_tokens, lm_head, rotation
        self.draft_ids = None if draft_ids is None else nnx.Variable(draft_ids)

    @property
    def num_layers(self) -> int:
        """Layers of its cache."""
        return 1

    @property
    def dtype(self):
        """Compute dtype."""
        return self.layers[0].post_attention_layernorm.weight.dtype

    def fuse(self, features: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """The target's features as the head wants them."""
        return features if self.rotation is None else self.rotation(features)

    def __call__(
        self, hidden: Float[Array, "B T D"], block: nn.Block, cache: KVCache, target: llama.Llama
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """One pass: row t holds the feature of its position and, in `block.tokens`, the token after it."""
        table = target.model.embed_tokens if self.embed_tokens is None else self.embed_tokens
        embedded = table(block.tokens).astype(hidden.dtype)
        x = self.fc(jnp.concatenate([embedded, hidden], axis=-1))
        rope = nn.rope_tables(self.config.rope, self.config.head_dim, block.positions)
        kept = cache.keys[0], cache.values[0]
        x, keys, values = nn.shared(self.layers[0], x, block, rope, *kept)
        return x, KVCache(keys=(keys,), values=(values,))

    def logits(self, hidden: Float[Array, "... D"], target: llama.Llama) -> Float[Array, "... U"]:
        """Logits over the draft vocabulary; float32."""
        if self.lm_head is None:
            return target.logits(hidden)
        return self.lm_head(hidden).astype(jnp.float32)

    def target_ids(self, draft_ids: Int[Array, "..."]) -> Int[Array, "..."]:
        """Token ids of the target's vocabulary."""
        return draft_ids if self.draft_ids is None else self.draft_ids[...][draft_ids]


def build(checkpoint, dtype) -> EagleHead:
    """Assembles a head from the tensors of the upstream layout, see `specjax.checkpoints.heads`."""
    config = checkpoint.config
    hidden, vocab, prefix = config.hidden_size, config.vocab_size, "layers.0"
    layer = nn.DecoderLayer(
        self_attn=llama.build_attention(
            checkpoint, f"{prefix}.self_attn", hidden, dtype, config.layer_kind(0)
        ),
        mlp=llama.build_mlp(checkpoint, f"{prefix}.mlp", dtype),
        input_layernorm=None,
        post_attention_layernorm=llama.build_norm(
            checkpoint, f"{prefix}.post_attention_layernorm", dtype
        ),
    )
    own = {}
    is_rotated = checkpoint.has("rms_norm_rotation.weight")
    if is_rotated:
        rotation = checkpoint.tensor("rms_norm_rotation.weight", (hidden, hidden))
        own["rotation"] = Linear(jnp.asarray(rotation, dtype))
    if is_rotated or checkpoint.has("embed_tokens.weight"):
        table = checkpoint.tensor("embed_tokens.weight", (vocab, hidden))
        own["embed_tokens"] = nn.Embedding(jnp.asarray(table, dtype))
    if is_rotated or checkpoint.has("lm_head.weight"):
        own["lm_head"] = llama.build_linear(checkpoint, "lm_head", vocab, hidden, False, dtype)
    has_bias = checkpoint.has("fc.bias")
    fc = llama.build_linear(checkpoint, "fc", hidden, 2 * hidden, has_bias, dtype)
    return EagleHead(config, fc, layer, **own)
