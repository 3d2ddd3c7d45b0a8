"""Suffix lookup: how the text went on wherever it ended the same way before, as a tree.

The longest suffix of the text that occurred earlier is looked for, of any length up to `longest`, in prompt and answer
and in other texts where these are given; where several places match, their continuations become one tree, longer and
later matches weighing more (SuffixDecoding, arXiv 2411.04975, does so with counts in a suffix tree). Matches are found
by comparing, for all places at once, which is what a suffix automaton would answer, and has no structure to keep.
"""

from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from specjax.decoding import tree as trees
from specjax.decoding import union as unions
from specjax.drafters import base, options
from specjax.drafters.ngram import NgramState
from specjax.errors import ConfigError
from specjax.text import tokenizer

_MOST_TOKENS = 1 << 20  # of other texts: each is compared at every step


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Suffix:
    """Trees of continuations.

    Attributes:
        texts: token ids of other texts one after the other, -1 between them; empty without.
        draft_depth: length of a continuation.
        num_tree_nodes: most nodes of a tree, the root included.
        longest: suffixes are compared up to this length.
        shortest: shorter matches propose nothing.
        num_matches: places whose continuations are joined.
    """

    texts: Int[Array, "L"]
    draft_depth: int = field(default=12, metadata={"static": True})
    num_tree_nodes: int = field(default=16, metadata={"static": True})
    longest: int = field(default=16, metadata={"static": True})
    shortest: int = field(default=2, metadata={"static": True})
    num_matches: int = field(default=4, metadata={"static": True})

    needs = None

    @property
    def num_nodes(self) -> int:
        return self.num_tree_nodes

    @property
    def max_depth(self) -> int:
        return self.draft_depth

    @property
    def scratch(self) -> int:
        return self.num_nodes

    def following(self, depth: int) -> "Suffix":
        """The same where steps may commit `depth` drafts, its own or others'."""
        return self

    def init(self, target, batch, capacity):
        return NgramState(history=jnp.zeros((batch, capacity), jnp.int32))

    def prefill(self, target, state, chunk):
        return NgramState(history=base.history_of_chunk(state.history, chunk))

    def propose(self, target, cache, state, root, lengths, keys, sampling) -> base.Proposal:
        history = base.history_of_root(state.history, root, lengths)
        end = lengths + 1
        column = jnp.arange(history.shape[1])
        own = jnp.where(column < end[:, None], history, -1)
        suffix = self._suffix(own, end)
        found = [self._places(own, suffix, end - 1)]
        if self.texts.shape[0]:
            others = jnp.broadcast_to(self.texts, (len(root), self.texts.shape[0]))
            found.append(self._places(others, suffix, jnp.full_like(end, others.shape[1])))
        length, drafts = (jnp.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
        tree, chances = self._joined(root, length, drafts)
        state = NgramState(history=history)
        return base.Proposal(tree=tree, q=None, cache=cache, state=state, chances=chances)

    def _suffix(self, text: Int[Array, "B S"], end: Int[Array, "B"]) -> Int[Array, "B K"]:
        """The last tokens of each text, the last one first; -2, which matches nothing, before its begin."""
        index = end[:, None] - 1 - jnp.arange(self.longest)
        last = jnp.take_along_axis(text, jnp.maximum(index, 0), axis=1)
        return jnp.where(index >= 0, last, -2)

    def _places(self, text: Int[Array, "B S"], suffix: Int[Array, "B K"], last: Int[Array, "B"]):
        """Lengths [B, W] of the best matches that end before `last`, later ones first, and what followed [B, W, D]."""
        size = text.shape[1]
        index = jnp.arange(size)
        alive = index < last[:, None]
        matched = jnp.zeros(text.shape, jnp.int32)
        for back in range(self.longest):
            shifted = jnp.pad(text, ((0, 0), (back, 0)), constant_values=-1)[:, :size]
            alive &= shifted == suffix[:, back : back + 1]
            matched += alive.astype(jnp.int32)
        count = min(self.num_matches, size)
        score = jnp.where(matched >= self.shortest, matched * size + index, -1)
        best, place = lax.top_k(score, count)
        length = jnp.where(best >= 0, jnp.take_along_axis(matched, place, axis=1), 0)
        behind = place[..., None] + 1 + jnp.arange(self.draft_depth)
        inside = (behind < size) & (length > 0)[..., None]
        drafts = jax.vmap(lambda row, at: row[at])(text, jnp.minimum(behind, size - 1))
        return length, jnp.where(inside, drafts, -1)

    def _joined(self, root, length: Int[Array, "B W"], drafts: Int[Array, "B W D"]):
        """The tree of all continuations, and how likely its nodes are kept."""
        batch, places, depth = drafts.shape
        weight = jnp.where(length > 0, jnp.exp2((length - self.longest).astype(jnp.float32)), 0.0)
        share = weight / jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1e-30)
        # A match of n tokens is taken to go on with a chance of n / (n + 1) per token.
        most = jnp.max(length, axis=1).astype(jnp.float32)
        going_on = (most / (most + 1))[:, None, None] ** jnp.arange(1.0, depth + 1)
        known = jnp.cumprod(drafts >= 0, axis=-1, dtype=jnp.int32) > 0
        chances = jnp.where(known, share[..., None] * going_on, 0.0)
        number = 1 + jnp.arange(places * depth, dtype=jnp.int32).reshape(places, depth)
        parents = jnp.where(jnp.arange(depth) == 0, 0, number - 1)
        draft = trees.Tree(
            tokens=_with_root(root, drafts),
            parents=_with_root(jnp.full_like(root, -1), jnp.where(known, parents, -1)),
            max_depth=depth,
            often_empty=True,
        )
        chances = jnp.pad(chances.reshape(batch, -1), ((0, 0), (1, 0)), constant_values=1.0)
        return unions.union([draft], [chances], self.num_tree_nodes, depth, combine="add")

    def commit(self, target, state, lengths, verified):
        return NgramState(history=base.history_of_step(state.history, lengths, verified))

    def rollback(self, state, lengths, root, features):
        return state


def _with_root(root, rows: Int[Array, "B W D"]) -> Int[Array, "B N"]:
    return jnp.concatenate([root[:, None], rows.reshape(len(root), -1)], axis=1)


def build(
    target,
    draft_depth: int = 12,
    num_nodes: int = 16,
    longest: int = 16,
    shortest: int = 2,
    num_matches: int = 4,
    texts: str | None = None,
) -> Suffix:
    """Checked options to a drafter.

    Args:
        texts: file of other texts (UTF-8, one per line), such as earlier answers, to look in as well.
    """
    named = dict(draft_depth=draft_depth, longest=longest, shortest=shortest, num_nodes=num_nodes)
    options.lengths(target, num_matches=num_matches, **named)
    if longest < shortest:
        raise ConfigError(f"{longest=} is below {shortest=}")
    if not 2 <= num_nodes <= num_matches * draft_depth + 1:
        raise ConfigError(
            f"{num_nodes=}: a tree of {num_matches=} continuations of {draft_depth=} has 2 to "
            f"{num_matches * draft_depth + 1} nodes"
        )
    return Suffix(
        texts=jnp.asarray(_tokens(target, texts)),
        draft_depth=draft_depth,
        num_tree_nodes=num_nodes,
        longest=longest,
        shortest=shortest,
        num_matches=num_matches,
    )


def _tokens(target, file: str | None) -> Int[np.ndarray, "L"]:
    """Texts as ids, -1 between them."""
    if file is None:
        return np.zeros(0, np.int32)
    known = tokenizer.usable(target.tokenizer)
    if known is None:
        raise ConfigError(f"texts={file!r}: the target {target.name!r} has no tokenizer to read it")
    if not Path(file).is_file():
        raise FileNotFoundError(f"texts={file!r}: no such file")
    ids: list[int] = []
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        if line.strip():
            ids += [*known.encode(line, add_special_tokens=False), -1]
    if not 0 < len(ids) <= _MOST_TOKENS:
        raise ConfigError(
            f"texts={file!r} has {len(ids)} tokens: from 1 to {_MOST_TOKENS} are looked through"
        )
    return np.asarray(ids, np.int32)
