"""What requests change of the target's logits before anything is chosen: bias by token, and penalties of repetition."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from specjax.decoding import tree as trees
from specjax.decoding.tree import Tree


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Adjustments:
    """One row per sequence.

    Attributes:
        bias_ids: token ids whose logits are shifted; the vocabulary size fills the row up.
        bias: by how much.
        presence: taken off once from tokens that were generated.
        frequency: taken off as often as they were.
        repetition: divides positive, multiplies negative logits of tokens of prompt or output; 1 changes nothing.
        counts: how often each token was generated, the root included.
        in_prompt: whether it stands in the prompt.
    """

    bias_ids: Int[Array, "B J"]
    bias: Float[Array, "B J"]
    presence: Float[Array, "B"]
    frequency: Float[Array, "B"]
    repetition: Float[Array, "B"]
    counts: Int[Array, "B V"]
    in_prompt: Bool[Array, "B V"]


def adjusted(
    logits: Float[Array, "B N V"], by: Adjustments, tree: Tree | None = None
) -> Float[Array, "B N V"]:
    """Float32 logits after bias and penalties.

    Every node is judged by the text that leads to it: the tokens of its path count as generated, so that a draft is
    accepted exactly if it would have been chosen without drafting.

    Args:
        tree: the logits' nodes; None: rows without drafts before them.
    """
    logits = logits.astype(jnp.float32)
    asks = (by.presence != 0) | (by.frequency != 0) | (by.repetition != 1)
    asks = jnp.any(asks) | jnp.any(by.bias_ids < logits.shape[-1])
    return lax.cond(asks, lambda x: _adjust(x, by, tree), lambda x: x, logits)


def _adjust(logits, by, tree):
    batch, nodes, vocab = logits.shape
    row, node = jnp.arange(batch)[:, None, None], jnp.arange(nodes)[None, :, None]
    ids = jnp.broadcast_to(by.bias_ids[:, None], (batch, nodes, by.bias_ids.shape[1]))
    bias = jnp.broadcast_to(by.bias[:, None], ids.shape)
    logits = logits.at[row, node, ids].add(bias, mode="drop")
    counts = jnp.broadcast_to(by.counts[:, None], logits.shape)
    if tree is not None:
        drafted = trees.ancestor_mask(tree).at[:, :, 0].set(False)  # the root is among the counts
        tokens = jnp.where(drafted, tree.tokens[:, None], vocab)
        counts = counts.at[row, node, tokens].add(1, mode="drop")
    seen = by.in_prompt[:, None] | (counts > 0)
    factor = by.repetition[:, None, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / factor, logits * factor), logits)
    logits = logits - by.frequency[:, None, None] * counts.astype(jnp.float32)
    return jnp.where(counts > 0, logits - by.presence[:, None, None], logits)


def generated(
    by: Adjustments, tokens: Int[Array, "B P"], count: Int[Array, "B"]
) -> Int[Array, "B V"]:
    """The counts with the first `count` of `tokens` added."""
    column = jnp.arange(tokens.shape[1])
    ids = jnp.where(column < count[:, None], tokens, by.counts.shape[1])
    return by.counts.at[jnp.arange(tokens.shape[0])[:, None], ids].add(1, mode="drop")


def prompted(
    by: Adjustments, tokens: Int[Array, "B T"], valid: Int[Array, "B"]
) -> Bool[Array, "B V"]:
    """The tokens of the prompt with the first `valid` of `tokens` among them."""
    column = jnp.arange(tokens.shape[1])
    ids = jnp.where(column < valid[:, None], tokens, by.in_prompt.shape[1])
    return by.in_prompt.at[jnp.arange(tokens.shape[0])[:, None], ids].set(True, mode="drop")
