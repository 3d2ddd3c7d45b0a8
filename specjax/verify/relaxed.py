"""The acceptance rule of QSpec's released code (arXiv 2410.11305): random at temperature 0. Not lossless.

The paper's rule is a greedy match; the code runs rejection sampling between the softmaxes of both models although the
draft is greedy. It is here to compare acceptance rates with the reported ones.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from specjax.decoding import sampling as sample
from specjax.errors import ConfigError
from specjax.verify import base, rejection


@dataclass(frozen=True)
class Relaxed:
    """Keeps a greedy draft x with probability min(1, p(x) / q(x)), p and q the softmaxes at temperature 1.

    A rejection emits a draw from max(0, p - q); after full acceptance the target's most likely token follows.
    """

    lossless: ClassVar[bool] = False
    reads_q: ClassVar[bool] = True

    def __call__(self, tree, q, logits, keys, sampling) -> base.Verified:
        """See `base.Acceptor`.

        Raises:
            ConfigError: the drafter has no distribution of its drafts.
        """
        if q is None:
            raise ConfigError(
                "acceptance='relaxed' compares the draft's probabilities with the target's, and this drafter has "
                "none when greedy; use the drafter 'self' or 'lm', or acceptance='lossless'"
            )
        walk = rejection.walk(tree, q, sample.probabilities(logits, sampling), keys)
        parents = jnp.where(jnp.arange(tree.num_nodes) == 0, -1, tree.parents)
        refused = jnp.any(parents == walk.node[:, None], axis=1)
        drawn = sample.draw(sample.fold(keys, 1), walk.residual)
        best = sample.most_likely(logits)
        likeliest = jnp.take_along_axis(best, walk.node[:, None], axis=1)[:, 0]
        next_token = jnp.where(refused, drawn, likeliest)
        return base.verified(tree, walk.path, walk.length, next_token)
