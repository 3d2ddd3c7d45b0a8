"""What a draft head with a cache of its own keeps between rounds, and how accepted tokens get there.

The head's cache slot p holds the pair (feature at p, token at p + 1). Before tokens are drafted behind a root at
position C, slots 0 .. C - 1 must hold pairs with true target features. Pairs that the last step made known wait in
`pending` and enter the cache at the next `propose`.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specjax.drafters.base import Chunk
from specjax.models import cache as kv
from specjax.models import layers
from specjax.models.one_pass import Rows
from specjax.verify.base import Verified

# An outer engine may commit up to this many rows between two proposals besides a full path (see hierarchical.py).
_EXTRA_ROWS = 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class HeadState:
    """State of the head for each sequence.

    Attributes:
        cache: the head's own cache; slots below pending.start hold true pairs.
        pending: pairs to be taken in, at least one; the last token is the root and is filled in by `with_root`.
        in_cache: the pending pairs have already been written to the cache (writing them again changes nothing).
    """

    cache: kv.KVCache
    pending: Rows
    in_cache: Bool[Array, "B"]


def num_rows(max_depth: int) -> int:
    """Pairs that may wait at once where a step commits at most max_depth + 1 tokens."""
    return max_depth + 1 + _EXTRA_ROWS


def init(cache: kv.KVCache, batch: int, width: int, dtype, max_depth: int) -> HeadState:
    """State of empty sequences; `width` is that of fused features."""
    rows = num_rows(max_depth)
    pending = Rows(
        features=jnp.zeros((batch, rows, width), dtype),
        tokens=jnp.zeros((batch, rows), jnp.int32),
        start=jnp.zeros((batch,), jnp.int32),
        count=jnp.ones((batch,), jnp.int32),
    )
    return HeadState(cache=cache, pending=pending, in_cache=jnp.zeros((batch,), bool))


def after_chunk(
    state: HeadState, cache: kv.KVCache, rows: Float[Array, "B T D"], chunk: Chunk
) -> HeadState:
    """After a piece of the prompts: at a prompt's last position the next token is junk; that pair stays pending."""
    last = jnp.maximum(chunk.valid - 1, 0)
    row = jnp.take_along_axis(rows, last[:, None, None], axis=1)
    present = chunk.valid > 0
    kept = state.pending.features
    pending = replace(
        state.pending,
        features=kept.at[:, :1].set(jnp.where(present[:, None, None], row, kept[:, :1])),
        start=jnp.where(present, chunk.start + last, state.pending.start),
    )
    return replace(state, cache=cache, pending=pending)


def with_root(state: HeadState, root: Int[Array, "B"]) -> HeadState:
    """The state with the root behind the last pending pair."""
    pending = state.pending
    is_last = jnp.arange(pending.tokens.shape[1]) == (pending.count - 1)[:, None]
    tokens = jnp.where(is_last, root[:, None], pending.tokens)
    return replace(state, pending=replace(pending, tokens=tokens))


def written(state: HeadState, cache: kv.KVCache) -> HeadState:
    """The state once the pending pairs are in `cache`."""
    return replace(state, cache=cache, in_cache=jnp.ones_like(state.in_cache))


def commit(
    state: HeadState, rows: Float[Array, "B P D"], lengths: Int[Array, "B"], verified: Verified
) -> HeadState:
    """Lets the rows of a step wait, behind those that are not in the cache yet."""
    pending = state.pending
    taking_part = verified.length > 0
    replaced = taking_part & state.in_cache
    old = jnp.where(replaced, 0, pending.count)
    column = jnp.arange(verified.tokens.shape[1])
    inside = column < verified.length[:, None]
    slots = jnp.where(inside, old[:, None] + column, pending.tokens.shape[1])
    batch = jnp.arange(slots.shape[0])[:, None]
    pending = Rows(
        features=pending.features.at[batch, slots].set(rows, mode="drop"),
        tokens=pending.tokens.at[batch, slots].set(verified.tokens, mode="drop"),
        start=jnp.where(replaced, lengths, pending.start),
        count=old + verified.length,
    )
    return replace(state, pending=pending, in_cache=state.in_cache & ~taking_part)


def rollback(
    state: HeadState, lengths: Int[Array, "B"], features: Float[Array, "B D"]
) -> HeadState:
    """Shortens the text; `features` are the fused ones at position lengths - 1."""
    pending = state.pending
    kept = lengths - pending.start
    keep = kept > 0
    first = jnp.where(keep[:, None], pending.features[:, 0], features)
    pending = replace(
        pending,
        features=pending.features.at[:, 0].set(first),
        start=jnp.where(keep, pending.start, lengths - 1),
        count=jnp.where(keep, kept, 1),
    )
    return replace(state, pending=pending, in_cache=jnp.zeros_like(state.in_cache))


def begin(head, batch: int, capacity: int, max_depth: int) -> HeadState:
    """State of empty sequences for a head that drafts one token a pass, as `specjax.models.eagle.EagleHead` does."""
    cache = kv.init(head.config, batch, capacity, head.dtype, num_layers=head.num_layers)
    return init(cache, batch, head.config.hidden_size, head.dtype, max_depth)


def prefill(head, target, state: HeadState, chunk: Chunk) -> HeadState:
    """Takes in a piece of the prompts by a pass of such a head."""
    rows = head.fuse(chunk.features)
    block = layers.causal_block(chunk.next_tokens, chunk.start)
    _, cache = head(rows, block, state.cache, target)
    return after_chunk(state, cache, rows, chunk)


def flush(
    head, target, state: HeadState, root: Int[Array, "B"]
) -> tuple[HeadState, Float[Array, "B D"]]:
    """Writes the pending pairs to such a head's cache; also returns the prediction that the last of them makes."""
    state = with_root(state, root)
    pending = state.pending
    block = layers.causal_block(pending.tokens, pending.start)
    predicted, cache = head(pending.features, block, state.cache, target)
    last = (pending.count - 1)[:, None, None]
    return written(state, cache), jnp.take_along_axis(predicted, last, axis=1)[:, 0]
