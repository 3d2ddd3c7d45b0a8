"""Drafting with an EAGLE head: level-wise expansion, then the best nodes of all levels (arXiv 2406.16858, section 4).

The head's cache slot p holds the pair (feature at p, token at p + 1). Before a tree is grown from a root at position C,
slots 0 .. C - 1 must hold pairs with true target features. Pairs that the last step made known wait in `pending` and
enter the cache at the next `propose`.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from specjax.checkpoints import heads
from specjax.decoding import sampling as sample
from specjax.decoding import tree as trees
from specjax.drafters import base, draft_vocabulary, options
from specjax.errors import ConfigError
from specjax.files import hub
from specjax.models import cache as kv
from specjax.models import layers
from specjax.models.eagle import EagleHead
from specjax.quantize import heads as rotated
from specjax.quantize import shrink

# An outer engine may commit up to this many rows between two proposals besides a full path (see hierarchical.py).
_EXTRA_ROWS = 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class EagleState:
    """State of the head for each sequence.

    Attributes:
        cache: the head's own cache, one layer; slots below pending_start hold true pairs.
        features: fused target features of the pending pairs, consecutive positions from pending_start on.
        tokens: token after each pending position; the last one is the root and is filled in by `propose`.
        pending_start: position of the first pending pair.
        pending_len: number of pending pairs; pending_start + pending_len = C. At least 1.
        in_cache: the pending pairs have already been written to the cache (writing them again changes nothing).
    """

    cache: kv.KVCache
    features: Float[Array, "B R D"]
    tokens: Int[Array, "B R"]
    pending_start: Int[Array, "B"]
    pending_len: Int[Array, "B"]
    in_cache: Bool[Array, "B"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Eagle:
    """Dynamic top-k trees from a draft head.

    Attributes:
        head: the network (EAGLE-1/2 or EAGLE-3).
        draft_depth: levels of the tree (upstream's `depth` + 1).
        topk: children per node and nodes expanded per level.
        num_tree_nodes: nodes kept, the root included (upstream's `total_token`).
    """

    head: EagleHead
    draft_depth: int = field(default=6, metadata={"static": True})
    topk: int = field(default=10, metadata={"static": True})
    num_tree_nodes: int = field(default=60, metadata={"static": True})

    @property
    def needs(self) -> base.Needs:
        return self.head.needs

    @property
    def num_nodes(self) -> int:
        return self.num_tree_nodes

    @property
    def max_depth(self) -> int:
        return self.draft_depth

    @property
    def scratch(self) -> int:
        flush_rows = self.max_depth + 1 + _EXTRA_ROWS
        return max(self.num_tree_nodes, self.topk * (self.draft_depth - 1), flush_rows)

    def init(self, target, batch, capacity):
        head = self.head
        dtype = head.dtype
        rows = self.max_depth + 1 + _EXTRA_ROWS
        return EagleState(
            cache=kv.init(head.config, batch, capacity, dtype, num_layers=1),
            features=jnp.zeros((batch, rows, head.config.hidden_size), dtype),
            tokens=jnp.zeros((batch, rows), jnp.int32),
            pending_start=jnp.zeros((batch,), jnp.int32),
            pending_len=jnp.ones((batch,), jnp.int32),
            in_cache=jnp.zeros((batch,), bool),
        )

    def prefill(self, target, state, chunk):
        # At a prompt's last position the next token is junk; that pair stays pending and is written again.
        fused = self.head.fuse(chunk.features)
        block = layers.causal_block(chunk.next_tokens, chunk.start)
        _, cache = self.head(fused, block, state.cache, target)
        last = jnp.maximum(chunk.valid - 1, 0)
        row = jnp.take_along_axis(fused, last[:, None, None], axis=1)
        present = chunk.valid > 0
        features = state.features.at[:, :1].set(
            jnp.where(present[:, None, None], row, state.features[:, :1])
        )
        start = jnp.where(present, chunk.start + last, state.pending_start)
        return replace(state, cache=cache, features=features, pending_start=start)

    def propose(self, target, cache, state, root, lengths, keys, sampling) -> base.Proposal:
        state, feature = self._flush(target, state, root)
        candidates, own = self._expand(target, state.cache, feature, lengths)
        return base.Proposal(
            tree=trees.select(candidates, root, self.num_tree_nodes, self.max_depth),
            q=None,
            cache=cache,
            state=replace(state, cache=own),
        )

    def _flush(self, target, state: EagleState, root: Int[Array, "B"]):
        """Writes the pending pairs to the head's cache; returns the prediction that the last of them makes [B, D]."""
        last = (state.pending_len - 1)[:, None]
        tokens = jnp.where(jnp.arange(state.tokens.shape[1]) == last, root[:, None], state.tokens)
        block = layers.causal_block(tokens, state.pending_start)
        predicted, cache = self.head(state.features, block, state.cache, target)
        feature = jnp.take_along_axis(predicted, last[..., None], axis=1)[:, 0]
        in_cache = jnp.ones_like(state.in_cache)
        return replace(state, cache=cache, tokens=tokens, in_cache=in_cache), feature

    def _expand(self, target, cache: kv.KVCache, feature: Float[Array, "B D"], lengths):
        """Grows `draft_depth` levels of `topk` nodes; returns all candidates and the cache with their scratch rows."""
        batch, k = feature.shape[0], self.topk
        width = k * (self.draft_depth - 1)
        scores, tokens = self._top_k(target, feature)
        found = [(tokens, scores, jnp.full_like(tokens, -1))]
        hidden = jnp.repeat(feature[:, None], k, axis=1)
        index = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), (batch, k))
        seen = jnp.zeros((batch, k, width), bool)
        for level in range(1, self.draft_depth):
            first = k * (level - 1)
            seen = seen | (jnp.arange(width) == first + jnp.arange(k)[:, None])
            block = layers.Block(
                tokens=tokens,
                positions=jnp.repeat(lengths[:, None] + level - 1, k, axis=1),
                start=lengths + first,
                prefix=lengths,
                tail=seen,
            )
            hidden, cache = self.head(hidden, block, cache, target)
            child_scores, child_tokens = self._top_k(target, hidden)
            child_scores = (child_scores + scores[..., None]).reshape(batch, k * k)
            child_tokens = child_tokens.reshape(batch, k * k)
            found.append((child_tokens, child_scores, jnp.repeat(index, k, axis=1)))
            scores, best = lax.top_k(child_scores, k)
            parent = best // k
            tokens = jnp.take_along_axis(child_tokens, best, axis=1)
            index = trees.num_candidates(k, level) + best.astype(jnp.int32)
            hidden = jnp.take_along_axis(hidden, parent[..., None], axis=1)
            seen = jnp.take_along_axis(seen, parent[..., None], axis=1)
        tokens, scores, parents = (jnp.concatenate(x, axis=1) for x in zip(*found, strict=True))
        return trees.Candidates(tokens=tokens, scores=scores, parents=parents), cache

    def _top_k(self, target, hidden: Float[Array, "... D"]):
        """Log-probabilities and target token ids of the `topk` best next tokens."""
        scores, draft_ids = sample.log_top_k(self.head.logits(hidden, target), self.topk)
        return scores, self.head.target_ids(draft_ids)

    def commit(self, target, state, lengths, verified):
        taking_part = verified.length > 0
        replaced = taking_part & state.in_cache
        old_len = jnp.where(replaced, 0, state.pending_len)
        column = jnp.arange(verified.tokens.shape[1])
        slots = jnp.where(
            column < verified.length[:, None], old_len[:, None] + column, state.tokens.shape[1]
        )
        rows = jnp.arange(slots.shape[0])[:, None]
        fused = self.head.fuse(verified.features)
        return replace(
            state,
            features=state.features.at[rows, slots].set(fused, mode="drop"),
            tokens=state.tokens.at[rows, slots].set(verified.tokens, mode="drop"),
            pending_start=jnp.where(replaced, lengths, state.pending_start),
            pending_len=old_len + verified.length,
            in_cache=state.in_cache & ~taking_part,
        )

    def rollback(self, state, lengths, root, features):
        kept = lengths - state.pending_start
        keep = kept > 0
        first = jnp.where(keep[:, None], state.features[:, 0], self.head.fuse(features))
        return replace(
            state,
            features=state.features.at[:, 0].set(first),
            pending_start=jnp.where(keep, state.pending_start, lengths - 1),
            pending_len=jnp.where(keep, kept, 1),
            in_cache=jnp.zeros_like(state.in_cache),
        )


def eagle(head: EagleHead, draft_depth: int = 6, topk: int = 10, num_nodes: int = 60) -> Eagle:
    """Checks the tree's shape and builds the drafter.

    Raises:
        ConfigError: the tree cannot have that many nodes, or a value is not positive.
    """
    if draft_depth < 1 or topk < 1 or num_nodes < 2:
        raise ConfigError(f"{draft_depth=}, {topk=}, {num_nodes=}: at least 1, 1 and 2 are needed")
    most = trees.num_candidates(topk, draft_depth) + 1
    if num_nodes > most:
        raise ConfigError(
            f"{num_nodes=}: a tree of {draft_depth} levels with top-k {topk} has at most {most} nodes; "
            "lower --num_nodes or raise --draft_depth or --draft_topk"
        )
    return Eagle(head=head, draft_depth=draft_depth, topk=topk, num_tree_nodes=num_nodes)


def build(
    target,
    model: str | None = None,
    draft_depth: int = 6,
    topk: int = 10,
    num_nodes: int = 60,
    vocabulary: str | None = None,
    vocabulary_size: int | None = None,
    scheme: str | None = None,
) -> Eagle:
    """Loads the head `model` (None: the one that ships with the target), its vocabulary and scheme as asked for."""
    options.lengths(target, draft_depth=draft_depth)
    sample.whole("num_nodes", num_nodes)
    if sample.whole("topk", topk) > target.config.vocab_size:
        raise ConfigError(f"{topk=} exceeds the vocabulary of {target.config.vocab_size} tokens")
    path = model or target.default_head
    if path is None:
        raise ConfigError(
            f"drafter 'eagle': no head ships for {target.name!r}; pass its directory "
            "(--draft_checkpoint=DIR, or 'model' in the drafter's JSON)"
        )
    folder = hub.shipped_head(str(path)) or hub.resolve(str(path))
    head = heads.load_eagle(folder, target.module, target.name)
    rotated.check_pair(hub.resolve(target.name), folder)
    if vocabulary is not None or vocabulary_size is not None:
        ids = _draft_vocabulary(target, folder, vocabulary, vocabulary_size)
        if topk > len(ids):
            raise ConfigError(f"{topk=} exceeds the draft vocabulary of {len(ids)} tokens")
        head = shrink.with_vocabulary(head, target.module, ids)
    if scheme is not None:
        head = shrink.quantized(head, target.module, scheme)
    return eagle(head, draft_depth=draft_depth, topk=topk, num_nodes=num_nodes)


def _draft_vocabulary(target, head: Path, path: str | None, size: int | None):
    """Tokens to draft from a list, from the one beside the head, or from the tokenizer's merges; stop tokens too."""
    beside = head / draft_vocabulary.FILE_NAME
    if path is not None or beside.is_file():
        ranking = draft_vocabulary.read(Path(path or beside), target)
    else:
        ranking = draft_vocabulary.from_merges(target)
    return jnp.asarray(ranking.first(size, target.stop_ids))
