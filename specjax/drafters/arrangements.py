"""From the slots of one pass to a draft tree."""

from dataclasses import dataclass
from typing import Protocol

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from specjax.decoding import sampling as sample
from specjax.decoding import tree as trees
from specjax.decoding.sampling import Sampling
from specjax.decoding.tree import Tree
from specjax.drafters import chain as chains
from specjax.models.llama import Llama
from specjax.models.one_pass import OnePassHead


class Arrangement(Protocol):
    """What makes a tree of the slots of a pass: hashable, without arrays.

    Attributes:
        draft_depth: slots that are used: depth of the deepest node.
        num_nodes: nodes of a tree, the root included.
    """

    draft_depth: int

    @property
    def num_nodes(self) -> int: ...

    def __call__(
        self,
        head: OnePassHead,
        target: Llama,
        hidden: Float[Array, "B K D"],
        root: Int[Array, "B"],
        keys: UInt32[Array, "B 2"],
        sampling: Sampling,
    ) -> tuple[Tree, Float[Array, "B N V"] | None]:
        """The tree and the distribution that each node was drawn from, None for point masses."""


@dataclass(frozen=True, kw_only=True)
class Chain:
    """One draft from each slot: its most likely token, or a draw when sampling."""

    draft_depth: int

    @property
    def num_nodes(self) -> int:
        return self.draft_depth + 1

    def __call__(self, head, target, hidden, root, keys, sampling):
        hidden = hidden[:, : self.draft_depth]
        logits = head.logits(hidden, target)
        ids = head.target_ids(jnp.arange(logits.shape[-1], dtype=jnp.int32))

        def draft(carry, slot):
            previous, carry = carry
            index, row, own = slot
            if head.stepwise:
                carry, own = head.step(carry, row, own, previous)
            key = sample.fold(keys, index)
            token, q = chains.drawn(own, ids, target.config.vocab_size, key, sampling)
            return (token, carry), (token, q)

        slots = jnp.arange(self.draft_depth), hidden.swapaxes(0, 1), logits.swapaxes(0, 1)
        _, (drafts, q) = lax.scan(draft, (root, head.begin(hidden)), slots)
        q = None if q is None else chains.with_root(q.swapaxes(0, 1))
        return trees.chain(root, drafts.swapaxes(0, 1)), q


# Shape of a tree -> the arrangement, from the user's `HeadOptions` and the depth; the first is the default.
SHAPES = {"chain": lambda options, depth: Chain(draft_depth=depth)}
