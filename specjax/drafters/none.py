"""No drafting: plain autoregressive decoding through the same loop, so that every speed-up has a fair baseline."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from specjax.decoding import tree
from specjax.drafters import base


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NoDraft:
    """Proposes the root alone; every step yields one token."""

    needs = None
    num_nodes = 1
    max_depth = 0
    scratch = 1

    def following(self, depth: int) -> "NoDraft":
        """The same where steps may commit `depth` drafts, its own or others'."""
        return self

    def init(self, target, batch, capacity):
        return ()

    def prefill(self, target, state, chunk):
        return state

    def propose(self, target, cache, state, root, lengths, keys, sampling) -> base.Proposal:
        drafts = jnp.zeros((root.shape[0], 0), root.dtype)
        return base.Proposal(tree=tree.chain(root, drafts), q=None, cache=cache, state=state)

    def commit(self, target, state, lengths, verified):
        return state

    def rollback(self, state, lengths, root, features):
        return state


def build(target) -> NoDraft:
    """No options."""
    return NoDraft()
