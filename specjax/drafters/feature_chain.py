"""Drafting a chain with a head that predicts one feature a pass (EAGLE-1/2/3, MTP), as vLLM and SGLang serve them.

Each round takes in the pairs that the last step made known, with true features of the target, and drafts from the last
of them; pairs of drafts, made of the head's own features, are cut again.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from specjax.decoding import sampling as sample
from specjax.decoding import tree as trees
from specjax.drafters import base, pending
from specjax.drafters import chain as chains
from specjax.models import layers


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class FeatureChain:
    """Chains from a draft head.

    Attributes:
        head: a network with the calls of `specjax.models.eagle.EagleHead`.
        draft_depth: tokens drafted a round.
        longest_step: drafts that a step may commit where others draft too.
    """

    head: Any
    draft_depth: int = field(metadata={"static": True})
    longest_step: int = field(default=0, metadata={"static": True})

    def following(self, depth: int) -> "FeatureChain":
        """The same where steps may commit `depth` drafts, its own or others'."""
        return replace(self, longest_step=max(depth, self.max_depth))

    @property
    def needs(self) -> base.Needs:
        return self.head.needs

    @property
    def num_nodes(self) -> int:
        return self.draft_depth + 1

    @property
    def max_depth(self) -> int:
        return self.draft_depth

    @property
    def scratch(self) -> int:
        return pending.num_rows(max(self.max_depth, self.longest_step))

    def init(self, target, batch, capacity):
        return pending.begin(self.head, batch, capacity, max(self.max_depth, self.longest_step))

    def prefill(self, target, state, chunk):
        return pending.prefill(self.head, target, state, chunk)

    def propose(self, target, cache, state, root, lengths, keys, sampling) -> base.Proposal:
        state, feature = pending.flush(self.head, target, state, root)
        token, q = self._next(target, feature, sample.fold(keys, 0), sampling)

        def extend(carry, index):
            own, feature, token = carry
            block = layers.causal_block(token[:, None], lengths + index - 1)
            rows, own = self.head(feature[:, None], block, own, target)
            drafted = self._next(target, rows[:, 0], sample.fold(keys, index), sampling)
            return (own, rows[:, 0], drafted[0]), drafted

        steps = jnp.arange(1, self.draft_depth, dtype=jnp.int32)
        carry, rest = lax.scan(extend, (state.cache, feature, token), steps)
        drafts, q = jax.tree.map(
            lambda first, more: jnp.concatenate([first[:, None], more.swapaxes(0, 1)], axis=1),
            *((token, q), rest),
        )
        return base.Proposal(
            tree=trees.chain(root, drafts),
            q=chains.with_root(q),
            cache=cache,
            state=replace(state, cache=carry[0]),
        )

    def _next(self, target, feature: Float[Array, "B D"], keys, sampling):
        logits = self.head.logits(feature, target)
        ids = self.head.target_ids(jnp.arange(logits.shape[-1], dtype=jnp.int32))
        return chains.drawn(logits, ids, target.config.vocab_size, keys, sampling)

    def commit(self, target, state, lengths, verified):
        return pending.commit(state, self.head.fuse(verified.features), lengths, verified)

    def rollback(self, state, lengths, root, features):
        return pending.rollback(state, lengths, self.head.fuse(features))
