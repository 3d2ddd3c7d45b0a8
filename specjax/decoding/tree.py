"""Draft trees: the structure, everything derived from it, and the dynamic top-k choice of EAGLE-2 (arXiv 2406.16858).

Two invariants make the rest simple: the root is node 0, and a node's parent has a smaller index than the node.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Tree:
    """A batch of draft trees of one static size.

    Attributes:
        tokens: token of each node; node 0 is the root, the last committed token, which no cache holds yet.
        parents: index of each node's parent, smaller than the node's own; -1 for the root and for unused nodes.
        max_depth: static bound on the depth of any node (the root has depth 0).
        is_chain: static promise that node i, where used, has depth i.
        kept: where a target has pruned the drafted tree: which of its nodes these are; None: all of them.
        often_empty: static hint that often no node besides the root is used; the target then looks first, and runs the
            root alone where that is so.
    """

    tokens: Int[Array, "B N"]
    parents: Int[Array, "B N"]
    kept: Int[Array, "B N"] | None = None
    max_depth: int = field(metadata={"static": True})
    is_chain: bool = field(default=False, metadata={"static": True})
    often_empty: bool = field(default=False, metadata={"static": True})

    @property
    def num_nodes(self) -> int:
        """Nodes per tree, the root and unused ones included."""
        return self.tokens.shape[1]


def chain(
    root: Int[Array, "B"],
    drafts: Int[Array, "B n"],
    num_drafts: Int[Array, "B"] | None = None,
    often_empty: bool = False,
) -> Tree:
    """The root followed by a chain of drafts, of which the first `num_drafts` are used (default: all)."""
    count = drafts.shape[1]
    parents = jnp.broadcast_to(jnp.arange(-1, count, dtype=jnp.int32), (root.shape[0], count + 1))
    if num_drafts is not None:
        used = jnp.arange(count + 1) <= num_drafts[:, None]
        parents = jnp.where(used, parents, -1)
    tokens = jnp.concatenate([root[:, None], drafts], axis=1)
    return Tree(
        tokens=tokens, parents=parents, max_depth=count, is_chain=True, often_empty=often_empty
    )


def used(tree: Tree) -> Bool[Array, "B N"]:
    """Which nodes carry a token: the root and all nodes with a parent."""
    return (tree.parents >= 0).at[:, 0].set(True)


def subset(tree: Tree, kept: Int[Array, "B M"]) -> Tree:
    """The tree of the nodes `kept`: in order, the root first, of each its parent too; unused nodes stay unused."""
    rows = jnp.arange(kept.shape[0])[:, None]
    column = jnp.broadcast_to(jnp.arange(kept.shape[1], dtype=jnp.int32), kept.shape)
    place = jnp.zeros(tree.parents.shape, jnp.int32).at[rows, kept].set(column)
    parents = jnp.take_along_axis(tree.parents, kept, axis=1)
    moved = jnp.take_along_axis(place, jnp.maximum(parents, 0), axis=1)
    return replace(
        tree,
        tokens=jnp.take_along_axis(tree.tokens, kept, axis=1),
        parents=jnp.where(parents < 0, -1, moved),
        kept=kept,
    )


def num_draft_tokens(tree: Tree) -> Int[Array, "B"]:
    """Number of used nodes without the root."""
    return jnp.sum(tree.parents >= 0, axis=1, dtype=jnp.int32)


def ancestor_mask(tree: Tree) -> Bool[Array, "B N N"]:
    """mask[b, i, j]: node j is node i or one of its ancestors. Unused nodes have themselves only."""
    batch, count = tree.tokens.shape
    eye = jnp.broadcast_to(jnp.eye(count, dtype=bool), (batch, count, count))
    if tree.is_chain:
        lower = jnp.tril(jnp.ones((count, count), bool))
        return eye | (lower & used(tree)[:, :, None])
    parents = jnp.maximum(tree.parents, 0)[..., None]
    has_parent = (tree.parents >= 0)[..., None]
    mask = eye
    for _ in range(tree.max_depth):
        mask = mask | (has_parent & jnp.take_along_axis(mask, parents, axis=1))
    return mask


def depths(mask: Bool[Array, "B N N"]) -> Int[Array, "B N"]:
    """Depth of each node from its ancestor mask; the root and unused nodes have 0."""
    return jnp.sum(mask, axis=-1, dtype=jnp.int32) - 1


def path_to(mask: Bool[Array, "B N N"], node: Int[Array, "B"], max_depth: int) -> Int[Array, "B P"]:
    """Nodes from the root to `node`, one per depth; entries below `node`'s depth repeat the root."""
    on_path = jnp.take_along_axis(mask, node[:, None, None], axis=1)[:, 0]
    depth = depths(mask)
    at_depth = on_path[:, None] & (depth[:, None] == jnp.arange(max_depth + 1)[None, :, None])
    return jnp.argmax(at_depth, axis=-1).astype(jnp.int32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Candidates:
    """All nodes that a level-wise expansion has seen, in the order in which they were found (M of them).

    Attributes:
        tokens: token of each candidate.
        scores: cumulative log-probability along its path; never above its parent's.
        parents: index of the parent candidate, -1 for children of the root.
    """

    tokens: Int[Array, "B M"]
    scores: Float[Array, "B M"]
    parents: Int[Array, "B M"]


def num_candidates(topk: int, num_levels: int) -> int:
    """Candidates of a full expansion: topk on the first level, topk x topk on each further one."""
    return topk + (num_levels - 1) * topk * topk


def select(candidates: Candidates, root: Int[Array, "B"], num_nodes: int, max_depth: int) -> Tree:
    """Keeps the root and the `num_nodes - 1` best candidates (EAGLE-2, section 4.2), in the order they were found.

    Scores do not rise along a path and ties go to the earlier candidate, so the ancestors of a chosen candidate are
    always chosen too, and the order puts them first.
    """
    chosen = jnp.sort(lax.top_k(candidates.scores, num_nodes - 1)[1], axis=1)
    batch, total = candidates.tokens.shape
    rows = jnp.arange(batch)[:, None]
    node_of = jnp.zeros((batch, total), jnp.int32)
    node_of = node_of.at[rows, chosen].set(jnp.arange(1, num_nodes, dtype=jnp.int32))
    parent = jnp.take_along_axis(candidates.parents, chosen, axis=1)
    parent_node = jnp.take_along_axis(node_of, jnp.maximum(parent, 0), axis=1)
    parent_node = jnp.where(parent < 0, 0, parent_node)
    tokens = jnp.take_along_axis(candidates.tokens, chosen, axis=1)
    return Tree(
        tokens=jnp.concatenate([root[:, None], tokens], axis=1),
        parents=jnp.concatenate([jnp.full((batch, 1), -1, jnp.int32), parent_node], axis=1),
        max_depth=max_depth,
    )
