"""From the slots of one pass to a draft tree."""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from specjax.decoding import sampling as sample
from specjax.decoding import slot_trees
from specjax.decoding import tree as trees
from specjax.decoding.sampling import Sampling
from specjax.decoding.tree import Tree
from specjax.drafters import chain as chains
from specjax.models.llama import Llama
from specjax.models.one_pass import OnePassHead


class Arrangement(Protocol):
    """What makes a tree of the slots of a pass: hashable, without arrays.

    Attributes:
        draft_depth: slots that are used: depth of the deepest node.
        num_nodes: nodes of a tree, the root included.
    """

    draft_depth: int

    @property
    def num_nodes(self) -> int: ...

    def __call__(
        self,
        head: OnePassHead,
        target: Llama,
        hidden: Float[Array, "B K D"],
        root: Int[Array, "B"],
        keys: UInt32[Array, "B 2"],
        sampling: Sampling,
    ) -> tuple[Tree, Float[Array, "B N V"] | None]:
        """The tree and the distribution that each node was drawn from, None for point masses."""


# Paths of a level that have children, where a slot's distribution depends on the path: each costs an output head.
_MOST_PARENTS = 16


@dataclass(frozen=True, kw_only=True)
class Chain:
    """One draft from each slot: its most likely token, or a draw when sampling.

    Attributes:
        confidence: least probability of being kept; the chain ends before the first draft that is below.
    """

    draft_depth: int
    confidence: float | None = None

    @property
    def num_nodes(self) -> int:
        return self.draft_depth + 1

    def __call__(self, head, target, hidden, root, keys, sampling):
        hidden = hidden[:, : self.draft_depth]
        logits = head.logits(hidden, target)
        ids = head.target_ids(jnp.arange(logits.shape[-1], dtype=jnp.int32))

        def draft(carry, slot):
            previous, carry, going_on = carry
            index, row, own = slot
            if head.stepwise:
                carry, own = head.step(carry, row, own, previous)
            if self.confidence is not None:
                sure = jax.nn.sigmoid(head.confidence(row, previous)) >= self.confidence
                going_on = going_on & sure
            key = sample.fold(keys, index)
            token, q = chains.drawn(own, ids, target.config.vocab_size, key, sampling)
            return (token, carry, going_on), (token, q, going_on)

        slots = jnp.arange(self.draft_depth), hidden.swapaxes(0, 1), logits.swapaxes(0, 1)
        begin = head.begin(hidden, root) if head.stepwise else ()
        _, (drafts, q, kept) = lax.scan(draft, (root, begin, jnp.ones(root.shape, bool)), slots)
        q = None if q is None else chains.with_root(q.swapaxes(0, 1))
        count = None if self.confidence is None else jnp.sum(kept, axis=0, dtype=jnp.int32)
        return trees.chain(root, drafts.swapaxes(0, 1), count), q


@dataclass(frozen=True, kw_only=True)
class BestFirst:
    """The most probable paths through the slots; see `specjax.decoding.slot_trees`. Candidates, not draws: no q."""

    num_nodes: int
    draft_depth: int

    def __call__(self, head, target, hidden, root, keys, sampling):
        slots = _Slots(head, target, hidden[:, : self.draft_depth], self.num_nodes - 1)
        if not head.stepwise:
            tree = slot_trees.best_first(slots.tokens, slots.scores, root, self.num_nodes)
        else:
            sizes = self.num_nodes, _MOST_PARENTS
            begin = slots.begin(root)
            tree = slot_trees.best_first_by_steps(
                slots.children, begin, self.draft_depth, root, *sizes
            )
        return tree, None


@dataclass(frozen=True, kw_only=True)
class Widths:
    """All `topk` children of the most probable nodes, as JetSpec's trees are made. Candidates, not draws: no q."""

    num_nodes: int
    draft_depth: int
    topk: int

    def __call__(self, head, target, hidden, root, keys, sampling):
        slots = _Slots(head, target, hidden[:, : self.draft_depth], self.topk)
        begin = slots.begin(root)
        sizes = self.num_nodes, self.topk
        return slot_trees.widths(slots.children, begin, self.draft_depth, root, *sizes), None


class _Slots:
    """What the slots of a pass say: the `ranks` most probable tokens of each, falling."""

    def __init__(self, head: OnePassHead, target: Llama, hidden: Float[Array, "B K D"], ranks: int):
        self._head, self._hidden = head, hidden
        self._logits = head.logits(hidden, target)
        self._ranks = min(ranks, self._logits.shape[-1])
        if not head.stepwise:
            self.tokens, self.scores = self._best(self._logits)

    def _best(self, logits):
        scores, ids = sample.log_top_k(logits, self._ranks)
        return self._head.target_ids(ids), scores

    def begin(self, root):
        """Of a path that is the root alone; arrays [B, 1, ...]."""
        if not self._head.stepwise:
            return ()
        return jax.tree.map(lambda leaf: leaf[:, None], self._head.begin(self._hidden, root))

    def children(self, carry, level, token):
        """See `slot_trees.best_first_by_steps`."""
        at = jnp.minimum(level, self._hidden.shape[1] - 1)[..., None]
        if not self._head.stepwise:
            index = jnp.broadcast_to(at, (*level.shape, self._ranks))
            tokens = jnp.take_along_axis(self.tokens, index, axis=1)
            return carry, tokens, jnp.take_along_axis(self.scores, index, axis=1)
        rows = jnp.take_along_axis(self._hidden, at, axis=1)
        logits = jnp.take_along_axis(self._logits, at, axis=1)
        flat = [x.reshape(-1, *x.shape[2:]) for x in (rows, logits, token)]
        carry = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), carry)
        carry, logits = self._head.step(carry, *flat)
        carry = jax.tree.map(lambda leaf: leaf.reshape(*level.shape, *leaf.shape[1:]), carry)
        tokens, scores = self._best(logits.reshape(*level.shape, -1))
        return carry, tokens, scores


def _chain(options, depth: int) -> Chain:
    return Chain(draft_depth=depth, confidence=options.confidence)


def _best_first(options, depth: int) -> BestFirst:
    return BestFirst(num_nodes=options.num_nodes or _NUM_NODES, draft_depth=depth)


def _widths(options, depth: int) -> Widths:
    nodes = options.num_nodes or _NUM_NODES
    return Widths(num_nodes=nodes, draft_depth=depth, topk=options.topk or _TOPK)


_NUM_NODES, _TOPK = 32, 8
# Shape of a tree -> the arrangement, from the user's `HeadOptions` and the depth; the first is the default.
SHAPES = {"best-first": _best_first, "chain": _chain, "topk": _widths}
