"""Typical acceptance (Medusa, arXiv 2401.10774, section 3.3.1): keeps drafts that are likely enough. Not lossless."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from specjax.decoding import sampling as sample
from specjax.verify import base

# Upstream adds it within the logarithm of the entropy.
_LOG_OFFSET = 1e-5


@dataclass(frozen=True)
class Typical:
    """Keeps a node if its probability after its parent exceeds min(epsilon, delta * exp(-entropy)), and its ancestors.

    The deepest such node wins, the likelier path among equals. Where the target is unsure more is let through, so the
    output drifts from the target's distribution towards what the drafter says.

    Attributes:
        epsilon: probability that always suffices.
        delta: share of exp(-entropy) that suffices.
    """

    epsilon: float = 0.09
    delta: float = 0.3

    lossless: ClassVar[bool] = False
    reads_q: ClassVar[bool] = False

    def __call__(self, tree, q, logits, keys, sampling) -> base.Verified:
        """See `base.Acceptor`; `q` is not read. The bonus token is drawn from the target."""
        probs = sample.probabilities(logits, sampling)
        entropy = -jnp.sum(probs * jnp.log(probs + _LOG_OFFSET), axis=-1)
        threshold = jnp.minimum(self.epsilon, self.delta * jnp.exp(-entropy))
        parents = jnp.maximum(tree.parents, 0)
        rows = jnp.arange(parents.shape[0])[:, None]
        likely = probs[rows, parents, tree.tokens]
        kept = likely > jnp.take_along_axis(threshold, parents, axis=1)
        found = base.deepest(tree, kept, jnp.log(jnp.maximum(likely, 1e-30)))
        last = jnp.take_along_axis(probs, found.node[:, None, None], axis=1)[:, 0]
        return base.verified(tree, found.path, found.length, sample.draw(keys, last))
