"""The target's two passes: over a chunk of prompts and over a draft tree."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from specjax.decoding import tree as trees
from specjax.decoding.tree import Tree
from specjax.models import layers
from specjax.models.cache import KVCache
from specjax.models.llama import ForwardOutput, Llama
from specjax.pallas import device

_GPU_ROWS = 8


def forward_chunk(
    model: Llama,
    tokens: Int[Array, "B T"],
    start: Int[Array, "B"],
    cache: KVCache,
    needs,
    length: Int[Array, "B"] | None = None,
) -> tuple[ForwardOutput, Float[Array, "B T A"] | None]:
    """Runs consecutive tokens at positions start, start + 1, ...; returns the output and the features asked for.

    Args:
        length: of the whole texts that the tokens are pieces of; see `Block.length`.
    """
    capture = needs if isinstance(needs, tuple) else ()
    out = model(layers.causal_block(tokens, start, length), cache, capture)
    return out, _features(out, needs)


def forward_tree(
    model: Llama,
    tree: Tree,
    cache: KVCache,
    lengths: Int[Array, "B"],
    needs,
    live: Bool[Array, "B"] | None = None,
) -> tuple[Float[Array, "B N V"], Float[Array, "B N A"] | None, KVCache, Tree]:
    """Runs all nodes of a tree whose root stands at position `lengths`.

    Node n is written to slot lengths + n and sees the committed text and its own ancestors.

    Args:
        live: sequences whose output counts: only they decide which layers run; None is all.
    Returns:
        logits of every node, features of every node (None where none are needed), the cache, and the tree that the rows
        belong to (the one sent; of a target that prunes, a subset).
    """

    def all_nodes(cache):
        return _score(model, tree, cache, lengths, needs, live)

    def root_only(cache):
        return _score_root(model, tree, cache, lengths, needs, live)

    if not tree.often_empty:
        outputs = all_nodes(cache)
    else:
        drafted = jnp.any(trees.num_draft_tokens(tree) > 0)
        outputs = lax.cond(drafted, all_nodes, root_only, cache)
    *outputs, kept = outputs
    return *outputs, tree if kept is None else trees.subset(tree, kept)


def padded_nodes(count: int) -> int:
    """Rows that a block of `count` nodes takes: what the matrix instructions of GPUs take at once; as many on CPUs.

    The rows behind the nodes write junk to the slots behind theirs.
    """
    return count if device.current() is None else -(-count // _GPU_ROWS) * _GPU_ROWS


def tree_block(tree: Tree, lengths: Int[Array, "B"]) -> layers.Block:
    """The block of a tree's nodes, padded to `padded_nodes` rows."""
    count = tree.num_nodes
    spare = padded_nodes(count) - count
    tokens = jnp.pad(tree.tokens, ((0, 0), (0, spare))) if spare else tree.tokens
    if tree.is_chain:
        return layers.causal_block(tokens, lengths)
    mask = trees.ancestor_mask(tree)
    depths = trees.depths(mask)
    if spare:
        mask = jnp.pad(mask, ((0, 0), (0, spare), (0, spare)))
        depths = jnp.pad(depths, ((0, 0), (0, spare)))
    return layers.Block(
        tokens=tokens,
        positions=lengths[:, None] + depths,
        start=lengths,
        prefix=lengths,
        tail=mask,
    )


def _score(model: Llama, tree: Tree, cache: KVCache, lengths, needs, live):
    """Logits, features and cache of a pass over all nodes, and the nodes kept where the model prunes (else None)."""
    capture = needs if isinstance(needs, tuple) else ()
    if model.depth is None:
        out, kept = model(tree_block(tree, lengths), cache, capture), None
    else:
        out, kept = model.depth.run_tree(model, tree, cache, lengths, live, capture)
    count = tree.num_nodes if kept is None else kept.shape[1]
    if out.hidden.shape[1] != count:
        rows = out.hidden[:, :count], tuple(x[:, :count] for x in out.captured)
        out = replace(out, hidden=rows[0], captured=rows[1])
    return model.logits(out.hidden), _features(out, needs), out.cache, kept


def _score_root(model: Llama, tree: Tree, cache: KVCache, lengths, needs, live):
    """Like `_score` for trees of which only the root is used; the other nodes' rows are zeros."""
    root = trees.chain(tree.tokens[:, 0], tree.tokens[:, :0])
    logits, features, cache, _ = _score(model, root, cache, lengths, needs, live)
    count, kept = tree.num_nodes, None
    if model.depth is not None and model.depth.kept_nodes(count) < count:
        count = model.depth.kept_nodes(count)
        kept = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (len(tree.tokens), count))

    def padded(rows):
        return jnp.pad(rows, ((0, 0), (0, count - 1), (0, 0)))

    return *jax.tree.map(padded, (logits, features)), cache, kept


def _features(out: ForwardOutput, needs):
    """The rows that a drafter needs: final-norm output, or the named layers' inputs side by side."""
    if needs is None:
        return None
    return out.hidden if needs == "final" else jnp.concatenate(out.captured, axis=-1)
