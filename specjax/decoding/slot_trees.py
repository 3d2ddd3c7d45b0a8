"""Trees from distributions of positions: nodes of the most probable paths, under a budget of nodes.

The score of a path is the sum of the log-probabilities of its tokens, so the `budget` best paths are the tree whose
expected number of accepted tokens is largest if the slots' distributions are right and independent (DDTree). They are
found level by level: a path that is among the best ends in a path that is, and the one of rank r behind the i-th best
has (i + 1)(r + 1) - 1 others of its level at least as good, so that few pairs (i, r) have to be looked at.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from specjax.decoding.tree import Candidates, Tree

Children = Callable[[Any, Int[Array, "..."], Int[Array, "..."]], tuple[Any, Array, Array]]


def best_first(
    tokens: Int[Array, "B D R"],
    scores: Float[Array, "B D R"],
    root: Int[Array, "B"],
    num_nodes: int,
) -> Tree:
    """The root and the best `num_nodes - 1` paths, best first; a chain where one token per slot is given.

    Args:
        tokens, scores: the most probable tokens of each slot and their log-probabilities, falling.
    """
    width, (batch, _, ranks) = num_nodes - 1, tokens.shape
    pairs = [(i, r) for i in range(width) for r in range(min(ranks, width // (i + 1)))]
    path, rank = (jnp.asarray(part, jnp.int32) for part in zip(*pairs, strict=True))

    def level(carry, slot):
        reached, places, at = carry
        slot_tokens, slot_scores = slot
        found = reached[:, path] + slot_scores[:, rank]
        kept, pick = lax.top_k(found, width)
        parents = jnp.take_along_axis(places, path[pick], axis=1)
        own = jnp.broadcast_to(at + jnp.arange(width, dtype=jnp.int32), places.shape)
        chosen = jnp.take_along_axis(slot_tokens, rank[pick], axis=1)
        return (kept, own, at + width), (chosen, kept, parents)

    first = jnp.where(jnp.arange(width) == 0, 0.0, -jnp.inf)
    carry = (
        jnp.broadcast_to(first, (batch, width)),
        jnp.full((batch, width), -1, jnp.int32),
        jnp.int32(0),
    )
    _, found = lax.scan(level, carry, (tokens.swapaxes(0, 1), scores.swapaxes(0, 1)))
    return _chosen(found, root, num_nodes, tokens.shape[1])


def best_first_by_steps(
    children: Children,
    carry: Any,
    depth: int,
    root: Int[Array, "B"],
    num_nodes: int,
    num_parents: int,
) -> Tree:
    """As `best_first`, where a slot's distribution depends on the path: so many paths of a level have children.

    Args:
        children: (carry, level [B, P], token [B, P]) of paths -> (their carry, tokens [B, P, R] and scores [B, P, R] of
            what may follow, falling).
        carry: of the root; arrays [B, 1, ...].
    """
    width, batch = num_nodes - 1, len(root)
    parents = min(width, num_parents)

    def spread(leaf):
        return jnp.broadcast_to(leaf, (batch, parents, *leaf.shape[2:]))

    def level(state, index):
        carry, path_tokens, reached, places = state
        at = jnp.full((batch, parents), index, jnp.int32)
        carry, tokens, scores = children(carry, at, path_tokens)
        ranks = tokens.shape[-1]
        found = (reached[..., None] + scores).reshape(batch, parents * ranks)
        kept, pick = lax.top_k(found, min(width, parents * ranks))
        chosen = jnp.take_along_axis(tokens.reshape(batch, -1), pick, axis=1)
        source = pick // ranks
        own = index * kept.shape[1] + jnp.arange(kept.shape[1], dtype=jnp.int32)
        out = chosen, kept, jnp.take_along_axis(places, source, axis=1)
        source = source[:, :parents]
        carry = jax.tree.map(lambda leaf: _rows(leaf, source), carry)
        own = jnp.broadcast_to(own[:parents], source.shape)
        return (carry, chosen[:, :parents], kept[:, :parents], own), out

    first = jnp.where(jnp.arange(parents) == 0, 0.0, -jnp.inf)
    state = (
        jax.tree.map(spread, carry),
        jnp.broadcast_to(root[:, None], (batch, parents)),
        jnp.broadcast_to(first, (batch, parents)),
        jnp.full((batch, parents), -1, jnp.int32),
    )
    _, found = lax.scan(level, state, jnp.arange(depth, dtype=jnp.int32))
    return _chosen(found, root, num_nodes, depth)


def _rows(leaf: Array, index: Int[Array, "B P"]) -> Array:
    return jax.vmap(lambda rows, at: rows[at])(leaf, index)


def _chosen(found, root: Int[Array, "B"], num_nodes: int, depth: int) -> Tree:
    """The best candidates, best first; a path's score is never above that of its beginning, and ties go to that."""
    tokens, scores, parents = (x.swapaxes(0, 1).reshape(len(root), -1) for x in found)
    candidates = Candidates(tokens=tokens, scores=scores, parents=parents)
    width = min(num_nodes - 1, tokens.shape[1])
    score, chosen = lax.top_k(candidates.scores, width)
    batch, total = tokens.shape
    rows = jnp.arange(batch)[:, None]
    node_of = jnp.zeros((batch, total), jnp.int32)
    node_of = node_of.at[rows, chosen].set(jnp.arange(1, width + 1, dtype=jnp.int32))
    parent = jnp.take_along_axis(candidates.parents, chosen, axis=1)
    node = jnp.where(parent < 0, 0, jnp.take_along_axis(node_of, jnp.maximum(parent, 0), axis=1))
    return _tree(
        root,
        jnp.take_along_axis(candidates.tokens, chosen, axis=1),
        jnp.where(jnp.isfinite(score), node, -1),
        num_nodes,
        depth,
    )


def _tree(root, tokens, parents, num_nodes: int, depth: int) -> Tree:
    missing = ((0, 0), (0, num_nodes - 1 - tokens.shape[1]))
    parents = jnp.pad(parents, missing, constant_values=-1)
    tokens = jnp.pad(jnp.where(parents[:, : tokens.shape[1]] < 0, 0, tokens), missing)
    return Tree(
        tokens=jnp.concatenate([root[:, None], tokens], axis=1),
        parents=jnp.concatenate([jnp.full_like(root, -1)[:, None], parents], axis=1),
        max_depth=depth,
    )


def widths(
    children: Children,
    carry: Any,
    depth: int,
    root: Int[Array, "B"],
    num_nodes: int,
    topk: int,
) -> Tree:
    """Takes the best node that has no children yet and gives it all its `topk`, until there are `num_nodes` (JetSpec).

    Args:
        children, carry: as for `best_first_by_steps`, for one path (P = 1); R = `topk`.
    """
    batch = len(root)
    rows = jnp.arange(batch)

    def put(array, at, value):
        return array.at[rows, at].set(value)

    def expand(state, begin):
        tokens, scores, parents, depths, is_open, carries = state
        can = is_open & (depths < depth)
        best = jnp.argmax(jnp.where(can, scores, -jnp.inf), axis=1).astype(jnp.int32)
        live = jnp.take_along_axis(can, best[:, None], axis=1)
        is_open = put(is_open, best, False)
        at = best[:, None]
        level = jnp.take_along_axis(depths, at, axis=1)
        token = jnp.take_along_axis(tokens, at, axis=1)
        carry, found, gained = children(
            jax.tree.map(lambda leaf: _rows(leaf, at), carries), level, token
        )
        slots = begin + jnp.arange(topk, dtype=jnp.int32)[None]
        slots = jnp.where(live, slots, num_nodes)
        index = rows[:, None], slots
        own = jnp.take_along_axis(scores, at, axis=1)
        return (
            tokens.at[index].set(found[:, 0], mode="drop"),
            scores.at[index].set(own + gained[:, 0], mode="drop"),
            parents.at[index].set(at, mode="drop"),
            depths.at[index].set(level + 1, mode="drop"),
            is_open.at[index].set(True, mode="drop"),
            jax.tree.map(lambda kept, new: kept.at[index].set(new, mode="drop"), carries, carry),
        ), None

    shape = (batch, num_nodes)
    state = (
        jnp.zeros(shape, jnp.int32).at[:, 0].set(root),
        jnp.full(shape, -jnp.inf).at[:, 0].set(0.0),
        jnp.full(shape, -1, jnp.int32),
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape, bool).at[:, 0].set(True),
        jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*shape, *leaf.shape[2:])), carry),
    )
    steps = jnp.arange(1, num_nodes, topk, dtype=jnp.int32)
    state, _ = lax.scan(expand, state, steps)
    tokens, _, parents, *_ = state
    return _tree(root, tokens[:, 1:], parents[:, 1:], num_nodes, depth)
