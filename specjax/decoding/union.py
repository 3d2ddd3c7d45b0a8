"""One tree from several: equal beginnings are one path, and the nodes most likely to be kept stay under the budget."""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from specjax.decoding import tree as trees
from specjax.decoding.tree import Tree

Combine = Literal["max", "add"]


def union(
    drafts: Sequence[Tree],
    chances: Sequence[Float[Array, "B _"]],
    num_nodes: int,
    max_depth: int,
    combine: Combine = "max",
) -> tuple[Tree, Float[Array, "B N"]]:
    """The tree, and its nodes' chances.

    Args:
        drafts: trees with the same roots.
        chances: of each node, how likely it is kept; never above its parent's. What stands at the root is not read.
        num_nodes: of the result, the root included; it has fewer where the drafts together have.
        max_depth: deeper nodes are left out.
        combine: what a path's chance is that several drafts hold: the largest, or the sum (of shares of one whole).
    """
    tokens, parents, depth, chance = _joined(drafts, chances)
    usable = (depth > 0) & (depth <= max_depth)
    first = _first_equals(tokens, parents, depth, usable, max_depth)
    rows = jnp.arange(len(tokens))[:, None]
    merged = jnp.zeros(chance.shape, jnp.float32).at[rows, first]
    chance = jnp.where(usable, chance, 0.0)
    merged = merged.max(chance) if combine == "max" else merged.add(chance)
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    counts = usable & (first == index)
    parents = jnp.where(
        parents < 0, -1, jnp.take_along_axis(first, jnp.maximum(parents, 0), axis=1)
    )
    return _best(
        tokens, parents, jnp.where(counts, merged, -jnp.inf), drafts[0], num_nodes, max_depth
    )


def _joined(drafts, chances):
    """Nodes of all drafts without the roots, side by side; children of a root have parent -1; unused ones depth 0."""
    tokens, parents, depths, found, offset = [], [], [], [], 0
    for draft, chance in zip(drafts, chances, strict=True):
        parent = draft.parents[:, 1:]
        depths.append(trees.depths(trees.ancestor_mask(draft))[:, 1:])
        parents.append(jnp.where(parent <= 0, -1, parent - 1 + offset))
        tokens.append(draft.tokens[:, 1:])
        found.append(chance[:, 1:].astype(jnp.float32))
        offset += parent.shape[1]
    return tuple(jnp.concatenate(parts, axis=1) for parts in (tokens, parents, depths, found))


def _first_equals(
    tokens: Int[Array, "B M"],
    parents: Int[Array, "B M"],
    depth: Int[Array, "B M"],
    usable: Bool[Array, "B M"],
    max_depth: int,
) -> Int[Array, "B M"]:
    """Of each node the first that ends the same path, level by level."""
    first = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    for level in range(1, max_depth + 1):
        above = jnp.where(
            parents < 0, -1, jnp.take_along_axis(first, jnp.maximum(parents, 0), axis=1)
        )
        here = usable & (depth == level)
        same = (tokens[:, :, None] == tokens[:, None]) & (above[:, :, None] == above[:, None])
        same &= here[:, :, None] & here[:, None]
        first = jnp.where(here, jnp.argmax(same, axis=-1).astype(jnp.int32), first)
    return first


def _best(tokens, parents, chance, draft: Tree, num_nodes: int, max_depth: int):
    """The best nodes in the order in which they came; a parent's chance is not below and ties go to it."""
    width = min(num_nodes - 1, tokens.shape[1])
    chosen = jnp.sort(lax.top_k(chance, width)[1], axis=1)
    batch, total = tokens.shape
    rows = jnp.arange(batch)[:, None]
    node_of = jnp.zeros((batch, total), jnp.int32)
    node_of = node_of.at[rows, chosen].set(jnp.arange(1, width + 1, dtype=jnp.int32))
    parent = jnp.take_along_axis(parents, chosen, axis=1)
    node = jnp.where(parent < 0, 0, jnp.take_along_axis(node_of, jnp.maximum(parent, 0), axis=1))
    kept = jnp.take_along_axis(chance, chosen, axis=1)
    used = jnp.isfinite(kept)
    picked = jnp.where(used, jnp.take_along_axis(tokens, chosen, axis=1), 0)
    tree = Tree(
        tokens=jnp.concatenate([draft.tokens[:, :1], picked], axis=1),
        parents=jnp.concatenate([draft.parents[:, :1], jnp.where(used, node, -1)], axis=1),
        max_depth=max_depth,
        often_empty=draft.often_empty,
    )
    return tree, jnp.pad(jnp.where(used, kept, 0.0), ((0, 0), (1, 0)), constant_values=1.0)
