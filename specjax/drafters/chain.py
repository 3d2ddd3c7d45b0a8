"""Drafting a chain with a language model, and the choice of a draft, which draft heads share."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from specjax.decoding import sampling as sample
from specjax.decoding.sampling import Sampling
from specjax.models import layers
from specjax.models.cache import KVCache
from specjax.models.llama import Llama


def draft_chain(
    model: Llama,
    cache: KVCache,
    block: layers.Block,
    num_drafts: int,
    keys: UInt32[Array, "B 2"],
    sampling: Sampling,
):
    """Continues the text whose last tokens are `block` by `num_drafts` tokens.

    Args:
        block: the tokens that the cache lacks, the root last.
    Returns:
        drafts [B, n], their distributions q [B, n, V] (None when greedy, unless asked for), and the cache, which holds
        all drafts but the last.
    """
    first = model(block, cache)
    token, probs = _next(model, first.hidden[:, -1], sample.fold(keys, 0), sampling)
    root_slot = block.start + block.tokens.shape[1] - 1

    def extend(carry, index):
        cache, token = carry
        out = model(layers.causal_block(token[:, None], root_slot + index), cache)
        drafted = _next(model, out.hidden[:, -1], sample.fold(keys, index), sampling)
        return (out.cache, drafted[0]), drafted

    steps = jnp.arange(1, num_drafts, dtype=jnp.int32)
    (cache, _), (tokens, q) = lax.scan(extend, (first.cache, token), steps)
    drafts = jnp.concatenate([token[:, None], tokens.swapaxes(0, 1)], axis=1)
    if probs is None:
        return drafts, None, cache
    return drafts, jnp.concatenate([probs[:, None], q.swapaxes(0, 1)], axis=1), cache


def _next(model: Llama, hidden, keys, sampling: Sampling):
    """Draws a token; also returns its distribution, None when greedy unless it was asked for."""
    return drawn(model.logits(hidden), None, None, keys, sampling)


def drawn(
    logits: Float[Array, "B U"],
    ids: Int[Array, "U"] | None,
    vocab_size: int | None,
    keys: UInt32[Array, "B 2"],
    sampling: Sampling,
) -> tuple[Int[Array, "B"], Float[Array, "B V"] | None]:
    """A draft and the distribution that it was drawn from; None when greedy, unless it was asked for.

    Args:
        ids: token of the target that each logit stands for, and `vocab_size` the size of its vocabulary; None: the
            logits are over that vocabulary.
    """
    probs = None
    if not sampling.greedy or sampling.with_q:
        probs = sample.probabilities(logits, sampling)
        if ids is not None:
            # Tokens outside of the draft vocabulary are never drawn.
            spread = jnp.zeros((len(probs), vocab_size), probs.dtype)
            probs = spread.at[:, ids].set(probs)
    if sampling.greedy:
        token = sample.most_likely(logits)
        return (token if ids is None else ids[token]), probs
    return sample.draw(keys, probs), probs


def with_root(q):
    """Draft distributions [B, n, V] as one per tree node [B, n + 1, V]; the root's is never read."""
    return None if q is None else jnp.pad(q, ((0, 0), (1, 0), (0, 0)))
