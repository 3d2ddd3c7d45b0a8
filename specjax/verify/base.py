"""What an acceptance rule is, and what it returns."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from specjax.decoding import tree as trees
from specjax.decoding.sampling import Sampling
from specjax.decoding.tree import Tree


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


@runtime_checkable
class Acceptor(Protocol):
    """Decides which drafted nodes stay. A value without arrays: hashable, a static argument of the loop.

    Attributes:
        lossless: the output is the target's: the same tokens when greedy, the same distribution when sampling.
        reads_q: drafts need their distributions even when greedy.
    """

    lossless: ClassVar[bool]
    reads_q: ClassVar[bool]

    def __call__(
        self,
        tree: Tree,
        q: Float[Array, "B N V"] | None,
        logits: Float[Array, "B N V"],
        keys: UInt32[Array, "B 2"],
        sampling: Sampling,
    ) -> Verified: ...


class Found(NamedTuple):
    """The deepest node that is kept: its path from the root, the path's length, and the node itself."""

    path: Int[Array, "B P"]
    length: Int[Array, "B"]
    node: Int[Array, "B"]


def deepest(
    tree: Tree, kept: Bool[Array, "B N"], scores: Float[Array, "B N"] | None = None
) -> Found:
    """The deepest node that is kept together with all its ancestors; the root always is.

    Args:
        kept: by its own merit; not read for the root and for unused nodes.
        scores: among equally deep nodes the path with the largest sum wins; default: the first node.
    """
    kept = (kept & (tree.parents >= 0)).at[:, 0].set(True)
    mask = trees.ancestor_mask(tree)
    accepted = kept & jnp.all(kept[:, None] | ~mask, axis=-1)
    depth = jnp.where(accepted, trees.depths(mask), -1)
    most = jnp.max(depth, axis=1)
    if scores is None:
        node = jnp.argmax(depth, axis=1).astype(jnp.int32)
    else:
        along = jnp.sum(jnp.where(mask, scores[:, None], 0.0), axis=-1) - scores[:, :1]
        best = jnp.where(depth == most[:, None], along, -jnp.inf)
        node = jnp.argmax(best, axis=1).astype(jnp.int32)
    return Found(path=trees.path_to(mask, node, tree.max_depth), length=most + 1, node=node)


def verified(
    tree: Tree, path: Int[Array, "B P"], length: Int[Array, "B"], next_token: Int[Array, "B"]
) -> Verified:
    """Fills in the tokens of an accepted path."""
    drafts = jnp.take_along_axis(tree.tokens, path, axis=1)
    shifted = jnp.concatenate([drafts[:, 1:], next_token[:, None]], axis=1)
    is_bonus = jnp.arange(path.shape[1]) == length[:, None] - 1
    tokens = jnp.where(is_bonus, next_token[:, None], shifted)
    return Verified(path=path, length=length, tokens=tokens, next_token=next_token)
