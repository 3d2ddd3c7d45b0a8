"""Greedy match: a drafted node stays if it is the target's most likely token after its parent."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from specjax.decoding import sampling as sample
from specjax.verify import base


@dataclass(frozen=True)
class Greedy:
    """Keeps the deepest node all of whose path equals the target's argmax; lossless for greedy decoding."""

    lossless: ClassVar[bool] = True
    reads_q: ClassVar[bool] = False

    def __call__(self, tree, q, logits, keys, sampling) -> base.Verified:
        """See `base.Acceptor`; `q`, `keys` and `sampling` are not read."""
        best = sample.most_likely(logits)
        expected = jnp.take_along_axis(best, jnp.maximum(tree.parents, 0), axis=1)
        found = base.deepest(tree, tree.tokens == expected)
        next_token = jnp.take_along_axis(best, found.node[:, None], axis=1)[:, 0]
        return base.verified(tree, found.path, found.length, next_token)
