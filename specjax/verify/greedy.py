"""Greedy match: a drafted node stays if it is the target's most likely token after its parent."""

from dataclasses import dataclass

import jax.numpy as jnp

from specjax import tree as trees
from specjax.verify import base


@dataclass(frozen=True)
class Greedy:
    """Keeps the deepest node all of whose path equals the target's argmax; lossless for greedy decoding."""

    def __call__(self, tree, q, logits, keys, sampling) -> base.Verified:
        """See `base.Acceptor`; `q`, `keys` and `sampling` are not read."""
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        expected = jnp.take_along_axis(best, jnp.maximum(tree.parents, 0), axis=1)
        matches = ((tree.parents >= 0) & (tree.tokens == expected)).at[:, 0].set(True)
        mask = trees.ancestor_mask(tree)
        accepted = matches & jnp.all(matches[:, None] | ~mask, axis=-1)
        depth = jnp.where(accepted, trees.depths(mask), -1)
        node = jnp.argmax(depth, axis=1).astype(jnp.int32)
        path = trees.path_to(mask, node, tree.max_depth)
        length = jnp.max(depth, axis=1) + 1
        next_token = jnp.take_along_axis(best, node[:, None], axis=1)[:, 0]
        return base.verified(tree, path, length, next_token)
