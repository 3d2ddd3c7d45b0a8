"""Which nodes of a draft tree decide what layers run, and which are dropped on the way (SpaDec).

A layer is skipped only if nobody who votes runs through it, and the many nodes of a tree seldom agree. Once a predictor
has scored them at an early layer, either only the most promising path votes ("vote", as SpaDec's released code does it)
or the less promising branches are dropped ("prune", as its figure shows). Both are approximations: a node may be denied
layers that it would have run through, or not be verified at all.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from specjax.decoding import tree as trees
from specjax.decoding.tree import Tree
from specjax.errors import ConfigError

Mode = Literal["off", "vote", "prune"]
MODES = ("off", "vote", "prune")
DEFAULT_SURVIVORS = 16
# Depths below this count ln(depth + 1), from it on 1 / cosh(depth - this).
_EXPECTED_DEPTH = 3


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What happens to the nodes at the predictor's layer.

    Attributes:
        mode: "off" (all nodes vote in every layer; the output is that of the routed model decoding one token after the
            other), "vote" or "prune".
        survivors: nodes that "prune" keeps, the root included; smaller trees are kept whole.
    """

    mode: Mode = "off"
    survivors: int = DEFAULT_SURVIVORS

    def __post_init__(self):
        if self.mode not in MODES:
            raise ConfigError(f"tree_selection={self.mode!r}: supported are {', '.join(MODES)}")
        if self.survivors < 1:
            raise ConfigError(
                f"survivors={self.survivors}: at least 1 (the root) is needed; "
                f"{DEFAULT_SURVIVORS} is the default"
            )


OFF = Selection()


def predicted_path(tree: Tree, scores: Float[Array, "B N"]) -> Bool[Array, "B N"]:
    """The nodes of the path that the scores favour, the root included.

    Nodes below the tree's mean score are dropped with all that hangs from them, unless the root is one of them: then
    none is. Of the leaves that remain, the one whose path has the largest weighted sum of scores wins, the first among
    equals.
    """
    used, mask = trees.used(tree), trees.ancestor_mask(tree)
    total = jnp.sum(jnp.where(used, scores, 0.0), axis=1, keepdims=True)
    high = scores >= total / jnp.sum(used, axis=1, keepdims=True, dtype=jnp.float32)
    whole = high | ~high[:, :1]
    kept = used & jnp.all(whole[:, None] | ~mask, axis=-1)
    is_parent = tree.parents[:, None] == jnp.arange(tree.num_nodes)[:, None]
    is_leaf = kept & ~jnp.any(is_parent & kept[:, None], axis=-1)
    weights = jnp.asarray(_weights(tree.max_depth))[trees.depths(mask)]
    value = jnp.sum(jnp.where(mask, (scores * weights)[:, None], 0.0), axis=-1)
    best = jnp.argmax(jnp.where(is_leaf, value, -jnp.inf), axis=1)
    return jnp.take_along_axis(mask, best[:, None, None], axis=1)[:, 0]


def _weights(max_depth: int) -> np.ndarray:
    """What the score of a node at each depth counts."""
    depth = np.arange(max_depth + 1)
    far = 1 / np.cosh(np.maximum(depth - _EXPECTED_DEPTH, 0))
    return np.where(depth < _EXPECTED_DEPTH, np.log(depth + 1), far).astype(np.float32)


def survivors(tree: Tree, scores: Float[Array, "B N"], count: int) -> Int[Array, "B M"]:
    """The `count` best nodes, in order; the root is always one, and with a node its parent.

    A node is worth the least score on its path, so that no node is worth more than its parent, which stands before it.
    """
    used, mask = trees.used(tree), trees.ancestor_mask(tree)
    scores = scores.at[:, 0].set(jnp.inf)
    worth = jnp.min(jnp.where(mask, scores[:, None], jnp.inf), axis=-1)
    worth = jnp.where(used, worth, -jnp.inf)
    return jnp.sort(lax.top_k(worth, count)[1], axis=1).astype(jnp.int32)
