"""Drafting with heads that draft all tokens of a round in one pass; what a pass is, is said in `models.one_pass`.

A round takes in what the last step made known and drafts behind the root in the same pass; what the pass wrote behind
the known rows is junk, which the next round overwrites. How the distributions of its slots become a tree is an
arrangement (`specjax.drafters.arrangements`).
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from specjax.drafters import arrangements, base, pending
from specjax.models.one_pass import OnePassHead, Rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class OnePass:
    """Trees from one pass of a draft head.

    Attributes:
        head: the network.
        arrangement: what makes trees of its slots; a hashable value, as `arrangements.Chain`.
        longest_step: drafts that a step may commit where others draft too.
    """

    head: OnePassHead
    arrangement: arrangements.Arrangement = field(metadata={"static": True})
    longest_step: int = field(default=0, metadata={"static": True})

    def following(self, depth: int) -> "OnePass":
        """The same where steps may commit `depth` drafts, its own or others'."""
        return replace(self, longest_step=max(depth, self.max_depth))

    @property
    def needs(self) -> base.Needs:
        return self.head.needs

    @property
    def num_nodes(self) -> int:
        return self.arrangement.num_nodes

    @property
    def max_depth(self) -> int:
        return self.arrangement.draft_depth

    @property
    def scratch(self) -> int:
        rows = pending.num_rows(max(self.max_depth, self.longest_step))
        return max(self.num_nodes, rows + self.head.num_drafts + 1)

    def init(self, target, batch, capacity):
        head = self.head
        cache = head.init_cache(batch, capacity)
        depth = max(self.max_depth, self.longest_step)
        return pending.init(cache, batch, head.context_width, head.dtype, depth)

    def prefill(self, target, state, chunk):
        fused = self._fused(chunk.features, chunk.tokens.shape)
        rows = Rows(features=fused, tokens=chunk.next_tokens, start=chunk.start, count=chunk.valid)
        cache = self.head.take_in(rows, chunk.tokens, state.cache, target)
        return pending.after_chunk(state, cache, fused, chunk)

    def propose(self, target, cache, state, root, lengths, keys, sampling) -> base.Proposal:
        state = pending.with_root(state, root)
        hidden, own = self.head.draft(state.pending, root, state.cache, target)
        tree, q = self.arrangement(self.head, target, hidden, root, keys, sampling)
        return base.Proposal(tree=tree, q=q, cache=cache, state=pending.written(state, own))

    def commit(self, target, state, lengths, verified):
        rows = self._fused(verified.features, verified.tokens.shape)
        return pending.commit(state, rows, lengths, verified)

    def rollback(self, state, lengths, root, features):
        return pending.rollback(state, lengths, self._fused(features, lengths.shape))

    def _fused(self, features, shape):
        """Rows of context; of width 0 where the head needs none."""
        if features is None:
            return jnp.zeros((*shape, 0), self.head.dtype)
        return self.head.fuse(features)
