"""Lossless rejection sampling over chains and trees.

Chains: Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318). Trees: children of the current node are
tried in order; each rejection leaves the residual distribution, from which the next child, or in the end the bonus
token, is judged (SpecInfer, arXiv 2305.09781, section 4.3). A drafter whose candidates are a deterministic function of
the context proposes point masses (q None): rejecting x then removes x from the distribution.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from specjax.decoding import sampling as sample
from specjax.decoding.tree import Tree
from specjax.verify import base


@dataclass(frozen=True)
class Rejection:
    """Keeps the output distribution equal to the filtered target distribution, whatever the drafter proposes."""

    lossless: ClassVar[bool] = True
    reads_q: ClassVar[bool] = False

    def __call__(self, tree, q, logits, keys, sampling) -> base.Verified:
        """See `base.Acceptor`.

        Args:
            q: distribution that each node was drawn from, after filtering, siblings independently; None = point masses.
        """
        found = walk(tree, q, sample.probabilities(logits, sampling), keys)
        bonus = sample.draw(sample.fold(keys, 1), found.residual)
        return base.verified(tree, found.path, found.length, bonus)


class Walk(NamedTuple):
    """Where a walk through a tree ended.

    Attributes:
        node: the last accepted node.
        length: accepted nodes, the root included.
        path: the accepted nodes, root first.
        residual: the distribution of the next token, given which children were rejected.
    """

    node: Int[Array, "B"]
    length: Int[Array, "B"]
    path: Int[Array, "B P"]
    residual: Float[Array, "B V"]


def walk(
    tree: Tree,
    q: Float[Array, "B N V"] | None,
    target: Float[Array, "B N V"],
    keys: UInt32[Array, "B 2"],
) -> Walk:
    """Walks down from the root, accepting or rejecting children in order.

    Args:
        target: the target's distribution after each node.
    """
    rows = jnp.arange(target.shape[0])
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (tree.num_nodes,)))(
        sample.wrap(sample.fold(keys, 0))
    )

    # Parents come before their children and siblings stand in order, so one pass over the nodes is the walk: a
    # node matters only if its parent is where the walk stands.
    def visit(n, carry):
        is_child = tree.parents[:, n] == carry[0]
        return lax.cond(jnp.any(is_child), judge, lambda *args: args[-1], n, is_child, carry)

    def judge(n, is_child, carry):
        current, length, path, p = carry
        token = tree.tokens[:, n]
        p_token = p[rows, token]
        draft = _point_mass(token, p) if q is None else q[:, n]
        # p <= r q is a rejection for r in [0, 1): a token without target mass is never accepted.
        rejected = p_token <= uniforms[:, n] * draft[rows, token]
        accepted = is_child & ~rejected
        residual = jnp.maximum(p - draft * (p_token[:, None] if q is None else 1.0), 0.0)
        residual = residual / jnp.maximum(jnp.sum(residual, axis=-1, keepdims=True), 1e-30)
        p = jnp.where(accepted[:, None], target[:, n], p)
        p = jnp.where((is_child & rejected)[:, None], residual, p)
        current = jnp.where(accepted, n, current)
        path = jnp.where(
            accepted[:, None] & (jnp.arange(path.shape[1]) == length[:, None]), n, path
        )
        return current, length + accepted.astype(jnp.int32), path, p

    start = (
        jnp.zeros_like(rows, dtype=jnp.int32),
        jnp.ones_like(rows, dtype=jnp.int32),
        jnp.zeros((rows.shape[0], tree.max_depth + 1), jnp.int32),
        target[:, 0],
    )
    return Walk(*lax.fori_loop(1, tree.num_nodes, visit, start))


def _point_mass(token, p):
    """One-hot rows [B, V] at `token` in the dtype of `p`."""
    return jax.nn.one_hot(token, p.shape[-1], dtype=p.dtype)
