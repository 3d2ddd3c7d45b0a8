"""Drafting with an EAGLE head: level-wise expansion, then the best nodes of all levels (arXiv 2406.16858, section 4).

What the head's cache holds, and when, is said in `specjax.drafters.pending`.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from specjax.checkpoints import heads
from specjax.decoding import sampling as sample
from specjax.decoding import tree as trees
from specjax.drafters import base, draft_vocabulary, options, pending
from specjax.errors import ConfigError
from specjax.files import hub
from specjax.models import cache as kv
from specjax.models import layers
from specjax.models.eagle import EagleHead
from specjax.quantize import heads as rotated
from specjax.quantize import shrink


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Eagle:
    """Dynamic top-k trees from a draft head.

    Attributes:
        head: the network (EAGLE-1/2 or EAGLE-3).
        draft_depth: levels of the tree (upstream's `depth` + 1).
        topk: children per node and nodes expanded per level.
        num_tree_nodes: nodes kept, the root included (upstream's `total_token`).
        longest_step: drafts that a step may commit where others draft too.
    """

    head: EagleHead
    draft_depth: int = field(default=6, metadata={"static": True})
    topk: int = field(default=10, metadata={"static": True})
    num_tree_nodes: int = field(default=60, metadata={"static": True})
    longest_step: int = field(default=0, metadata={"static": True})

    def following(self, depth: int) -> "Eagle":
        """The same where steps may commit `depth` drafts, its own or others'."""
        return replace(self, longest_step=max(depth, self.max_depth))

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
        flush_rows = pending.num_rows(max(self.max_depth, self.longest_step))
        return max(self.num_tree_nodes, self.topk * (self.draft_depth - 1), flush_rows)

    def init(self, target, batch, capacity):
        return pending.begin(self.head, batch, capacity, max(self.max_depth, self.longest_step))

    def prefill(self, target, state, chunk):
        return pending.prefill(self.head, target, state, chunk)

    def propose(self, target, cache, state, root, lengths, keys, sampling) -> base.Proposal:
        state, feature = pending.flush(self.head, target, state, root)
        candidates, own = self._expand(target, state.cache, feature, lengths)
        return base.Proposal(
            tree=trees.select(candidates, root, self.num_tree_nodes, self.max_depth),
            q=None,
            cache=cache,
            state=replace(state, cache=own),
        )

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
        return pending.commit(state, self.head.fuse(verified.features), lengths, verified)

    def rollback(self, state, lengths, root, features):
        return pending.rollback(state, lengths, self.head.fuse(features))


def eagle(head: EagleHead, draft_depth: int = 6, topk: int = 10, num_nodes: int = 60) -> Eagle:
    """Checks the tree's shape and builds the drafter.

    Raises:
        ConfigError: the tree cannot have that many nodes, or a value is not positive.
    """
    if draft_depth < 1 or topk < 1 or num_nodes < 2:
        raise ConfigError(f"{draft_depth=}, {topk=}, {num_nodes=}: at least 1, 1 and 2 are needed")
    own = getattr(head, "d2t", None)
    if own is not None and topk > own.shape[0]:
        raise ConfigError(f"{topk=} exceeds the head's draft vocabulary of {own.shape[0]} tokens")
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
    window: int | None = None,
) -> Eagle:
    """Loads the head `model` (None: the one that ships with the target), its vocabulary and scheme as asked for.

    Args:
        window: tokens of the text that the head's attention sees at most, for texts longer than it was trained on.
    """
    options.lengths(target, draft_depth=draft_depth)
    if window is not None:
        options.lengths(target, window=window)
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
    head = heads.load_eagle(folder, target.module, target.name, window)
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
