"""Multi-token-prediction layer of its own file (speculators' `mtp`): one decoder layer, used again for every step."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from specjax.config import ModelConfig
from specjax.models import layers as nn
from specjax.models import llama
from specjax.models.cache import KVCache
from specjax.quant.dense_linear import Linear


class MTPHead(nnx.Module):
    """Predicts the next normed state; same calls as `specjax.models.eagle.EagleHead`.

    `input_proj` joins [normed embedding | normed feature]; the first feature is the target's last state before its
    final norm. Embeddings and output head are the target's, unless the file has its own.
    """

    def __init__(
        self,
        config: ModelConfig,
        needs: tuple[int, ...],
        input_proj: Linear,
        layer: nn.DecoderLayer,
        *,
        token_layernorm: nn.RMSNorm,
        hidden_layernorm: nn.RMSNorm,
        final_layernorm: nn.RMSNorm,
        embed_tokens: nn.Embedding | None = None,
        lm_head=None,
    ):
        self.config, self.needs = config, needs
        self.input_proj, self.layer = input_proj, layer
        self.token_layernorm, self.hidden_layernorm = token_layernorm, hidden_layernorm
        self.final_layernorm = final_layernorm
        self.embed_tokens, self.lm_head = embed_tokens, lm_head

    @property
    def num_layers(self) -> int:
        """Layers of its cache."""
        return 1

    @property
    def dtype(self):
        """Compute dtype."""
        return self.final_layernorm.weight.dtype

    def fuse(self, features: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """The target's features as the head wants them."""
        return features

    def __call__(
        self, hidden: Float[Array, "B T D"], block: nn.Block, cache: KVCache, target: llama.Llama
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """One pass: row t holds the feature of its position and, in `block.tokens`, the token after it."""
        table = target.model.embed_tokens if self.embed_tokens is None else self.embed_tokens
        embedded = self.token_layernorm(table(block.tokens).astype(hidden.dtype))
        x = jnp.concatenate([embedded, self.hidden_layernorm(hidden)], axis=-1)
        rope = nn.rope_tables(self.config.rope, self.config.head_dim, block.positions, block.length)
        kept = cache.keys[0], cache.values[0]
        x, keys, values = nn.shared(self.layer, self.input_proj(x), block, rope, *kept)
        return self.final_layernorm(x), KVCache(keys=(keys,), values=(values,))

    def logits(self, hidden: Float[Array, "... D"], target: llama.Llama) -> Float[Array, "... V"]:
        """Logits over the vocabulary; float32."""
        if self.lm_head is None:
            return target.logits(hidden)
        return self.lm_head(hidden).astype(jnp.float32)

    def target_ids(self, draft_ids: Int[Array, "..."]) -> Int[Array, "..."]:
        """Token ids of the target's vocabulary."""
        return draft_ids


def build(checkpoint, dtype, num_layers: int) -> MTPHead:
    """Assembles a head from tensors under speculators' names; `num_layers` are the target's."""
    config, prefix = checkpoint.config, "mtp_layers.0"
    hidden, vocab = config.hidden_size, config.vocab_size
    own = {}
    if checkpoint.has("embed_tokens.weight"):
        table = checkpoint.tensor("embed_tokens.weight", (vocab, hidden))
        own["embed_tokens"] = nn.Embedding(jnp.asarray(table, dtype))
    if checkpoint.has("lm_head.weight"):
        own["lm_head"] = llama.build_linear(checkpoint, "lm_head", vocab, hidden, False, dtype)
    norms = ("token_layernorm", "hidden_layernorm", "final_layernorm")
    return MTPHead(
        config,
        (num_layers,),
        llama.build_linear(checkpoint, f"{prefix}.input_proj", hidden, 2 * hidden, False, dtype),
        llama.build_layer(checkpoint, 0, dtype, prefix),
        **{n: llama.build_norm(checkpoint, f"{prefix}.{n}", dtype) for n in norms},
        **own,
    )
