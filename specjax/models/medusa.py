"""Medusa-1 heads (arXiv 2401.10774): each predicts one token further ahead from the same feature."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from specjax.config import ModelConfig
from specjax.models.cache import KVCache
from specjax.models.one_pass import OnePassHead
from specjax.quant.dense_linear import Linear


class MedusaHead(nnx.Module):
    """logits = lm_head(x + silu(linear(x))) for the final-norm feature x."""

    def __init__(self, linear: Linear, lm_head: Linear):
        self.linear, self.lm_head = linear, lm_head

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        residual = jax.nn.silu(self.linear(x).astype(jnp.float32)).astype(x.dtype)
        return self.lm_head(x + residual).astype(jnp.float32)


class MedusaHeads(nnx.Module):
    """Head i predicts the token i + 2 positions after the feature's (the target itself predicts the next one)."""

    def __init__(self, heads: list[MedusaHead]):
        self.heads = nnx.List(heads)

    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B n V"]:
        return jnp.stack([head(x) for head in self.heads], axis=1)


class MedusaSlots(OnePassHead):
    """The heads as slots of one pass: slot k is head k at the last known position. Nothing is cached.

    Attributes:
        heads: the network.
        num_drafts: its heads.
    """

    needs = "final"

    def __init__(self, heads: MedusaHeads):
        self.heads, self.num_drafts = heads, len(heads.heads)

    @property
    def dtype(self):
        return self.heads.heads[0].lm_head.weight.dtype

    @property
    def context_width(self):
        return self.heads.heads[0].linear.in_features

    def init_cache(self, batch, capacity):
        return KVCache(keys=(), values=())

    def take_in(self, rows, tokens, cache, target):
        return cache

    def draft(self, rows, root, cache, target):
        last = (rows.count - 1)[:, None, None]
        feature = jnp.take_along_axis(rows.features, last, axis=1)
        return jnp.repeat(feature, self.num_drafts, axis=1), cache

    def logits(self, hidden, target):
        each = [
            head(hidden[:, k]) for k, head in enumerate(list(self.heads.heads)[: hidden.shape[1]])
        ]
        return jnp.stack(each, axis=1)


def build(checkpoint, config: ModelConfig, num_heads: int, dtype) -> MedusaHeads:
    """Assembles heads from tensors `i.0.linear.{weight,bias}` and `i.1.weight`.

    Args:
        config: the target's; heads have no shape of their own.
    """
    width, vocab = config.hidden_size, config.vocab_size

    def tensor(name, shape):
        return jnp.asarray(checkpoint.tensor(name, shape), dtype)

    heads = []
    for i in range(num_heads):
        weight = tensor(f"{i}.0.linear.weight", (width, width))
        bias = tensor(f"{i}.0.linear.bias", (width,))
        out = tensor(f"{i}.1.weight", (vocab, width))
        heads.append(MedusaHead(Linear(weight, bias), Linear(out)))
    return MedusaHeads(heads)
