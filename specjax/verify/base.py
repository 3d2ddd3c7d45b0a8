"""What an acceptance rule is, and what it returns."""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from specjax.sampling import Sampling
from specjax.tree import Tree


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Verified:
    """Outcome of one step, per sequence.

    Attributes:
        path: nodes from the root to the deepest accepted one; entries from `length` on are any node.
        length: rows of `path` that count = accepted drafts + 1 (the root) = tokens this step adds, bonus included.
            0 marks a sequence that took no part; its state must not change.
        tokens: the new tokens: accepted drafts, then the bonus token at length - 1; junk behind.
        next_token: the bonus token = tokens[length - 1]; it becomes the next root.
        features: the target's features of the path rows, or None where the drafter needs none.
    """

    path: Int[Array, "B P"]
    length: Int[Array, "B"]
    tokens: Int[Array, "B P"]
    next_token: Int[Array, "B"]
    features: Float[Array, "B P D"] | None = None


class Acceptor(Protocol):
    """Decides which drafted nodes stay. A value without arrays: hashable, a static argument of the loop."""

    def __call__(
        self,
        tree: Tree,
        q: Float[Array, "B N V"] | None,
        logits: Float[Array, "B N V"],
        keys: UInt32[Array, "B 2"],
        sampling: Sampling,
    ) -> Verified: ...


def verified(
    tree: Tree, path: Int[Array, "B P"], length: Int[Array, "B"], next_token: Int[Array, "B"]
) -> Verified:
    """Fills in the tokens of an accepted path."""
    drafts = jnp.take_along_axis(tree.tokens, path, axis=1)
    shifted = jnp.concatenate([drafts[:, 1:], next_token[:, None]], axis=1)
    is_bonus = jnp.arange(path.shape[1]) == length[:, None] - 1
    tokens = jnp.where(is_bonus, next_token[:, None], shifted)
    return Verified(path=path, length=length, tokens=tokens, next_token=next_token)
