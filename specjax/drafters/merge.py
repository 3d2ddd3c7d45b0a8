"""Several drafters at once: the union of their trees under one budget, verified in one pass.

Every drafter proposes its most likely candidates; equal beginnings become one path, and the nodes that are most likely
to be kept stay. How likely that is, is learned while decoding: of each drafter, and of each depth and rank among
siblings, how often the target went on with such a node where it had come to its parent; a drafter that knows better
(`Proposal.chances`) is believed. Candidates are chosen without looking at the target's answer, so the result is
lossless, sampled too, with point masses in place of their distributions.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from specjax.decoding import sampling as sample
from specjax.decoding import tree as trees
from specjax.decoding import union as unions
from specjax.decoding.tree import Tree
from specjax.drafters import base
from specjax.drafters.base import Drafter
from specjax.errors import ConfigError

_RANKS = 4  # siblings that are told apart; further ones count as the last
_NUM_NODES = 32
_MEMORY = 0.95  # share of what was learned that a step leaves
# Before anything is learned: chance of a first child at any depth, of each further one relative to it, and how many
# steps that is worth.
_PRIOR, _FURTHER, _WORTH = 0.6, 0.3, 2.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class MergeState:
    """Attributes:
    states: of the drafters.
    proposed: their last trees.
    tried: steps that came to a node's parent, by drafter, depth and rank; older ones count less.
    kept: of these, how many went on with the node.
    """

    states: tuple[Any, ...]
    proposed: tuple[Tree, ...]
    tried: Float[Array, "B I D R"]
    kept: Float[Array, "B I D R"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Merge:
    """Attributes:
    drafters: whose trees are joined.
    num_tree_nodes: most nodes of the union, the root included.
    """

    drafters: tuple[Drafter, ...]
    num_tree_nodes: int = field(metadata={"static": True})

    @property
    def needs(self) -> base.Needs:
        found = {drafter.needs for drafter in self.drafters} - {None}
        if len(found) < 2:
            return next(iter(found), None)
        return tuple(sorted({layer for needs in found for layer in needs}))

    @property
    def num_nodes(self) -> int:
        return self.num_tree_nodes

    @property
    def max_depth(self) -> int:
        return max(drafter.max_depth for drafter in self.drafters)

    @property
    def scratch(self) -> int:
        return max(self.num_nodes, *(drafter.scratch for drafter in self.drafters))

    def _own(self, features, drafter: Drafter):
        """Of features that the union needs, those that one drafter does."""
        needs = self.needs
        if features is None or drafter.needs is None:
            return None
        if drafter.needs == needs:
            return features
        width = features.shape[-1] // len(needs)
        parts = [
            features[..., i * width : (i + 1) * width] for i in map(needs.index, drafter.needs)
        ]
        return jnp.concatenate(parts, axis=-1)

    def init(self, target, batch, capacity):
        tried, kept = self._prior(batch)
        return MergeState(
            states=tuple(d.init(target, batch, capacity) for d in self.drafters),
            proposed=tuple(_empty(d, batch) for d in self.drafters),
            tried=tried,
            kept=kept,
        )

    def _prior(self, batch: int) -> tuple[Float[Array, "B I D R"], Float[Array, "B I D R"]]:
        """What counts before anything is learned, and never fades."""
        shape = (batch, len(self.drafters), self.max_depth, _RANKS)
        chance = _PRIOR * _FURTHER ** jnp.arange(float(_RANKS))
        return jnp.full(shape, _WORTH), jnp.broadcast_to(_WORTH * chance, shape)

    def prefill(self, target, state, chunk):
        new = tuple(
            drafter.prefill(
                target, own, replace(chunk, features=self._own(chunk.features, drafter))
            )
            for drafter, own in zip(self.drafters, state.states, strict=True)
        )
        return replace(state, states=new)

    def propose(self, target, cache, state, root, lengths, keys, sampling) -> base.Proposal:
        likely = replace(sampling, greedy=True, with_q=False)
        drafts, chances, states = [], [], []
        rates = state.kept / state.tried
        for index, (drafter, own) in enumerate(zip(self.drafters, state.states, strict=True)):
            made = drafter.propose(target, cache, own, root, lengths, keys, likely)
            cache = made.cache
            known = made.chances
            drafts.append(made.tree)
            chances.append(_chances(made.tree, rates[:, index]) if known is None else known)
            states.append(made.state)
        tree, _ = unions.union(drafts, chances, self.num_nodes, self.max_depth)
        proposed = tuple(_plain(draft) for draft in drafts)
        tree = replace(tree, often_empty=all(draft.often_empty for draft in drafts))
        state = replace(state, states=tuple(states), proposed=proposed)
        return base.Proposal(tree=tree, q=None, cache=cache, state=state)

    def commit(self, target, state, lengths, verified):
        new, tried, kept = [], [], []
        for drafter, own, tree in zip(self.drafters, state.states, state.proposed, strict=True):
            features = self._own(verified.features, drafter)
            new.append(drafter.commit(target, own, lengths, replace(verified, features=features)))
            counts = _counts(tree, verified, self.max_depth)
            tried.append(counts[0])
            kept.append(counts[1])
        took_part = (verified.length > 0)[:, None, None, None]
        learned = []
        olds, prior = (state.tried, state.kept), self._prior(len(lengths))
        for old, first, counts in zip(olds, prior, (tried, kept), strict=True):
            renewed = first + _MEMORY * (old - first) + jnp.stack(counts, axis=1)
            learned.append(jnp.where(took_part, renewed, old))
        return replace(state, states=tuple(new), tried=learned[0], kept=learned[1])

    def rollback(self, state, lengths, root, features):
        new = tuple(
            drafter.rollback(own, lengths, root, self._own(features, drafter))
            for drafter, own in zip(self.drafters, state.states, strict=True)
        )
        return replace(state, states=new)


def _empty(drafter: Drafter, batch: int) -> Tree:
    shape = (batch, drafter.num_nodes)
    tokens = jnp.zeros(shape, jnp.int32)
    return Tree(tokens=tokens, parents=jnp.full(shape, -1, jnp.int32), max_depth=drafter.max_depth)


def _plain(tree: Tree) -> Tree:
    return replace(tree, is_chain=False, often_empty=False, kept=None)


def _places(tree: Tree):
    """Depth of each node, and its rank among its siblings, in their order."""
    depth = trees.depths(trees.ancestor_mask(tree))
    earlier = jnp.tril(jnp.ones((tree.num_nodes, tree.num_nodes), bool), -1)
    siblings = (tree.parents[:, :, None] == tree.parents[:, None]) & (tree.parents >= 0)[:, None]
    rank = jnp.sum(siblings & earlier, axis=-1, dtype=jnp.int32)
    return depth, jnp.minimum(rank, _RANKS - 1)


def _chances(tree: Tree, rates: Float[Array, "B D R"]) -> Float[Array, "B N"]:
    """Of each node: the product of the rates along its path."""
    depth, rank = _places(tree)
    rows = jnp.arange(len(depth))[:, None]
    own = jnp.where(depth > 0, jnp.log(rates[rows, jnp.maximum(depth - 1, 0), rank]), 0.0)
    mask = trees.ancestor_mask(tree)
    return jnp.exp(jnp.sum(jnp.where(mask, own[:, None], 0.0), axis=-1))


def _counts(tree: Tree, verified, max_depth: int):
    """(nodes whose parent the text came to, those of them that it went on with) by depth and rank."""
    depth, rank = _places(tree)
    rows = jnp.arange(len(depth))[:, None]
    at = jnp.zeros(len(depth), jnp.int32)
    here = jnp.ones(len(depth), bool)
    tried = jnp.zeros((len(depth), max_depth, _RANKS))
    kept = tried
    for level in range(min(max_depth, tree.max_depth)):
        here &= level < verified.length
        child = (tree.parents == at[:, None]) & (depth == level + 1) & here[:, None]
        hit = child & (tree.tokens == verified.tokens[:, level, None])
        tried = tried.at[rows, level, rank].add(child.astype(jnp.float32))
        kept = kept.at[rows, level, rank].add(hit.astype(jnp.float32))
        here &= jnp.any(hit, axis=1)
        at = jnp.argmax(hit, axis=1).astype(jnp.int32)
    return tried, kept


def merge(drafters: list[Drafter], num_nodes: int | None = None) -> Merge:
    """Checks that drafters can be joined, and joins them.

    Args:
        num_nodes: of the union at most; None: all nodes that the drafters have together, up to 32.

    Raises:
        ConfigError: fewer than two, one that only follows drafts of its own, or two that read the target's states in
            ways that do not go together.
    """
    if len(drafters) < 2:
        raise ConfigError(f"of has {len(drafters)} drafters: at least two are merged")
    most = 1 + sum(drafter.num_nodes - 1 for drafter in drafters)
    num_nodes = min(_NUM_NODES, most) if num_nodes is None else sample.whole("num_nodes", num_nodes)
    if not 2 <= num_nodes <= most:
        raise ConfigError(f"{num_nodes=}: these drafters together have 2 to {most} nodes")
    needs = {drafter.needs for drafter in drafters} - {None}
    if len(needs) > 1 and "final" in needs:
        raise ConfigError(
            "of: one drafter reads the target's normed output (EAGLE-1/2, Medusa) and another its inner states "
            "(EAGLE-3 and later heads); only drafters of one of the two kinds are merged"
        )
    longest = max(drafter.max_depth for drafter in drafters)
    joined = []
    for drafter in drafters:
        follow = getattr(drafter, "following", None)
        if follow is None:
            raise ConfigError(
                f"of: {type(drafter).__name__} knows its own drafts only, not those of others; merge ngram, suffix, "
                "eagle, head, medusa and self"
            )
        joined.append(follow(longest))
    return Merge(drafters=tuple(joined), num_tree_nodes=num_nodes)


def build(target, registry, of: list[dict], num_nodes: int | None = None) -> Merge:
    """Builds the drafters `of` and joins them."""
    return merge([registry.build(spec, target) for spec in of], num_nodes)
