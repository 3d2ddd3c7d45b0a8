"""Routed layers as training sees them: every layer runs for every token, and weights 0 or 1 say what counts.

The definition that skipping at inference is tested against. One pass over whole sequences, without a cache; padding
stands behind the text, where no token sees it.
"""

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specjax.depth import router as routing
from specjax.models import layers
from specjax.models.llama import Llama
from specjax.pallas.glue import parts
from specjax.training.depth.adapter import PROJECTIONS, Adapter, LayerAdapter

# How keys of tokens that skipped the layer leave the attention: their probabilities are dropped and the others
# renormalised (differentiable), or their scores are -inf. Equal but for the 1e-6 in the denominator of the first.
Eviction = Literal["renormalise", "mask"]
_SMALL = 1e-6


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class MaskedOutput:
    """What a pass yields.

    Attributes:
        hidden: after the final norm.
        executed: 1 where the token ran through the layer, 0 where it skipped it.
    """

    hidden: Float[Array, "B T D"]
    executed: Float[Array, "B T L"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Noise:
    """Randomness of training.

    Attributes:
        key: random key.
        dropout: rate at which outputs of the updates are dropped.
    """

    key: Array
    dropout: float = field(metadata={"static": True})

    def of_layer(self, index: int) -> "Noise":
        """Independent noise for a layer."""
        return Noise(key=jax.random.fold_in(self.key, index), dropout=self.dropout)

    def dropped(self, index: int, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Dropout of the output of projection `index`."""
        if self.dropout == 0:
            return x
        kept = jax.random.bernoulli(jax.random.fold_in(self.key, index), 1 - self.dropout, x.shape)
        return jnp.where(kept, x / (1 - self.dropout), 0)


def forward(
    model: Llama,
    adapter: Adapter | None,
    tokens: Int[Array, "B T"],
    *,
    noise: Noise | None = None,
    eviction: Eviction = "mask",
) -> MaskedOutput:
    """Runs a batch of sequences from their first tokens on.

    Args:
        adapter: routers and updates; None runs all layers of the model as it is.
        noise: makes the decisions draws of a straight-through Gumbel softmax (temperature 1); None: as at inference.
        eviction: see `Eviction`.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    tables = tuple(
        layers.rope_tables(rope, model.config.head_dim, positions) for rope in model.config.ropes
    )
    x = model.embed(tokens, positions)
    executed = []
    for index, layer in enumerate(model.model.layers):
        own = None if noise is None else noise.of_layer(index)
        weight = _weight(adapter, index, x, positions, own)
        update = None if adapter is None else adapter.layers[index]
        rope = layers.tables_of(layer, tables)
        y = _layer(layer, update, x, rope, weight, own, eviction)
        share = weight[..., None].astype(x.dtype)
        x = share * y + (1 - share) * x
        executed.append(weight)
    return MaskedOutput(hidden=model.model.norm(x), executed=jnp.stack(executed, axis=-1))


def straight_through(key: Array, logits: Float[Array, "... 2"]) -> Float[Array, "..."]:
    """A draw of 0 (skip) or 1 (execute) from the softmax of the logits, with the softmax's gradient."""
    noisy = logits + jax.random.gumbel(key, logits.shape, logits.dtype)
    soft = jax.nn.softmax(noisy)[..., routing.EXECUTE]
    hard = noisy[..., routing.EXECUTE] >= noisy[..., routing.SKIP]
    # The difference is exactly 0, so the value is exactly 0 or 1.
    return hard.astype(soft.dtype) + (soft - jax.lax.stop_gradient(soft))


def _weight(
    adapter: Adapter | None, index: int, x: Float[Array, "B T D"], positions, noise: Noise | None
) -> Float[Array, "B T"]:
    if adapter is None or index < adapter.config.start_layer:
        return jnp.ones(positions.shape, jnp.float32)
    router = adapter.routers[index - adapter.config.start_layer]
    if noise is None:
        weight = router.executes(x).astype(jnp.float32)
    else:
        weight = straight_through(jax.random.fold_in(noise.key, len(PROJECTIONS)), router(x))
    return jnp.where(positions < adapter.config.reserved_tokens, 1.0, weight)


def _layer(
    layer: layers.DecoderLayer,
    update: LayerAdapter | None,
    x: Float[Array, "B T D"],
    rope,
    weight: Float[Array, "B T"],
    noise: Noise | None,
    eviction: Eviction,
) -> Float[Array, "B T D"]:
    """The layer over all tokens, of which those with weight 0 show no key and value."""
    attention, normed = layer.self_attn, layer.input_layernorm(x)
    projected = attention.project_qkv(normed)
    if update is not None:
        projected = tuple(
            part + _updated(getattr(update, name), normed, index, noise).reshape(part.shape)
            for index, (name, part) in enumerate(zip(PROJECTIONS, projected, strict=True))
        )
    q, k, v = projected
    q, k = attention.rotate(q, k, rope)
    attended = _attend(q, k, v, weight, eviction).reshape(*x.shape[:2], -1)
    x = x + parts.value(parts.product(attention.o_proj, attended))
    return x + parts.value(layer.mlp(layer.post_attention_layernorm(x)))


def _updated(lora, x: Float[Array, "B T D"], index: int, noise: Noise | None):
    y = lora(x)
    return (y if noise is None else noise.dropped(index, y)).astype(x.dtype)


def _attend(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    weight: Float[Array, "B T"],
    eviction: Eviction,
) -> Float[Array, "B T K G C"]:
    batch, length, _, width = q.shape
    q = q.reshape(batch, length, k.shape[2], -1, width).astype(jnp.float32)
    scores = jnp.einsum("btkgc,bskc->bkgts", q, k.astype(jnp.float32)) * width**-0.5
    causal = jnp.tril(jnp.ones((length, length), bool))
    if eviction == "renormalise":
        shares = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
        shares = shares * weight[:, None, None, None, :]
        shares = shares / (jnp.sum(shares, axis=-1, keepdims=True) + _SMALL)
    else:
        # A token always sees itself: its row counts only where it executes, and is never empty.
        sees = causal & ((weight > 0)[:, None, :] | jnp.eye(length, dtype=bool))
        shares = jax.nn.softmax(jnp.where(sees[:, None, None], scores, -jnp.inf))
    return jnp.einsum("bkgts,bskc->btkgc", shares, v.astype(jnp.float32)).astype(v.dtype)
