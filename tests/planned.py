"""Drafters whose acceptance is known beforehand, and one that records: for tests of the loop around them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax.decoding import sampling as sample
from specjax.decoding import tree as trees
from specjax.drafters import base

# A chain of four drafts; and a tree whose right path 0-2-5-7 runs through second children and skips nodes.
CHAIN = ((-1, 0, 1, 2, 3), (0, 1, 2, 3, 4))
TREE = ((-1, 0, 0, 1, 2, 2, 5, 5, 4, 3), (0, 2, 5, 7))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PlannedState:
    """Attributes:
    history: all tokens of each sequence.
    step: steps that the sequence has taken part in.
    """

    history: Int[Array, "B S"]
    step: Int[Array, "B"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Planned:
    """Knows how the target continues each text, and drafts so that step i accepts `plan[i]` tokens.

    The next token of the right path is wrong then, and what lies below wrong tokens is right again: an acceptor that
    forgets an ancestor accepts too much. The plan is an array, so that all plans share one executable.

    Attributes:
        texts: prompts with their greedy continuations, padded with -1.
        plan: drafts to be accepted, step by step, over and over.
        vocab_size: of the target.
        parents: the tree.
        path: nodes of the right path, root first; no node is deeper than its last.
    """

    texts: Int[Array, "R S"]
    plan: Int[Array, "M"]
    vocab_size: int = field(metadata={"static": True})
    parents: tuple[int, ...] = field(metadata={"static": True})
    path: tuple[int, ...] = field(metadata={"static": True})

    needs = None

    @property
    def num_nodes(self) -> int:
        return len(self.parents)

    @property
    def max_depth(self) -> int:
        return len(self.path) - 1

    @property
    def scratch(self) -> int:
        return self.num_nodes

    def init(self, target, batch, capacity):
        history = jnp.zeros((batch, capacity), jnp.int32)
        return PlannedState(history=history, step=jnp.zeros((batch,), jnp.int32))

    def prefill(self, target, state, chunk):
        return replace(state, history=base.history_of_chunk(state.history, chunk))

    def propose(self, target, cache, state, root, lengths, keys, sampling):
        history = base.history_of_root(state.history, root, lengths)
        follow = self._continuation(history, lengths)
        accepted = self.plan[state.step % self.plan.shape[0]]
        columns, depth = [root], [0]
        for node in range(1, self.num_nodes):
            parent = self.parents[node]
            depth.append(depth[parent] + 1)
            right = follow[:, depth[node] - 1]
            if node in self.path:
                wrong = depth[node] == accepted + 1
                columns.append(jnp.where(wrong, (right + 1) % self.vocab_size, right))
            elif parent in self.path:
                columns.append((right + 2) % self.vocab_size)
            else:
                columns.append(right)
        tokens = jnp.stack(columns, axis=1)
        if self.parents == tuple(range(-1, self.num_nodes - 1)):
            tree = trees.chain(root, tokens[:, 1:])
        else:
            parents = jnp.broadcast_to(jnp.asarray(self.parents, jnp.int32), tokens.shape)
            tree = trees.Tree(tokens=tokens, parents=parents, max_depth=self.max_depth)
        return base.Proposal(tree=tree, q=None, cache=cache, state=replace(state, history=history))

    def _continuation(self, history, lengths):
        """The tokens that follow the root in the text that agrees with the history [B, max_depth]."""
        size = min(self.texts.shape[1], history.shape[1])
        beyond = jnp.arange(size) > lengths[:, None]
        same = (history[:, None, :size] == self.texts[None, :, :size]) | beyond[:, None]
        row = jnp.argmax(jnp.all(same, axis=-1), axis=1)
        slots = lengths[:, None] + 1 + jnp.arange(self.max_depth)
        return jnp.take_along_axis(
            self.texts[row], jnp.minimum(slots, self.texts.shape[1] - 1), axis=1
        )

    def commit(self, target, state, lengths, verified):
        history = base.history_of_step(state.history, lengths, verified)
        step = state.step + (verified.length > 0).astype(jnp.int32)
        return PlannedState(history=history, step=step)

    def rollback(self, state, lengths, root, features):
        return state


def planned(texts: Sequence[Sequence[int]], plan, shape=CHAIN, vocab_size: int = 1024) -> Planned:
    """A `Planned` drafter for texts (prompt and greedy continuation) that reach beyond what is asked for."""
    table = np.full((len(texts), max(map(len, texts))), -1, np.int32)
    for row, text in zip(table, texts, strict=True):
        row[: len(text)] = text
    return Planned(
        texts=jnp.asarray(table),
        # One size for all plans of up to five steps, so that they share executables.
        plan=jnp.asarray(np.resize(plan, 60), jnp.int32),
        vocab_size=vocab_size,
        parents=shape[0],
        path=shape[1],
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Bigram:
    """Samples a tree of fixed shape: each node from a table's row for its parent's token, siblings independently.

    Attributes:
        table: logits of the next token by token.
        parents: the tree.
        depth: of its deepest node.
    """

    table: Float[Array, "V V"]
    parents: tuple[int, ...] = field(metadata={"static": True})
    depth: int = field(metadata={"static": True})

    needs = None

    @property
    def num_nodes(self) -> int:
        return len(self.parents)

    @property
    def max_depth(self) -> int:
        return self.depth

    @property
    def scratch(self) -> int:
        return self.num_nodes

    def init(self, target, batch, capacity):
        return ()

    def prefill(self, target, state, chunk):
        return state

    def propose(self, target, cache, state, root, lengths, keys, sampling):
        tokens, q = [root], [jnp.zeros((root.shape[0], self.table.shape[1]), jnp.float32)]
        for node in range(1, self.num_nodes):
            q.append(sample.probabilities(self.table[tokens[self.parents[node]]], sampling))
            tokens.append(sample.draw(sample.fold(keys, node), q[-1]))
        tokens = jnp.stack(tokens, axis=1)
        parents = jnp.broadcast_to(jnp.asarray(self.parents, jnp.int32), tokens.shape)
        tree = trees.Tree(tokens=tokens, parents=parents, max_depth=self.depth)
        return base.Proposal(tree=tree, q=jnp.stack(q, axis=1), cache=cache, state=state)

    def commit(self, target, state, lengths, verified):
        return state

    def rollback(self, state, lengths, root, features):
        return state


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Recorded:
    """State of another drafter and the tokens and parents of the tree that it proposed last."""

    inner: Any
    tokens: Int[Array, "B N"]
    parents: Int[Array, "B N"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Recorder:
    """A drafter that keeps the last tree of `inner` in its state."""

    inner: Any

    @property
    def needs(self):
        return self.inner.needs

    @property
    def num_nodes(self) -> int:
        return self.inner.num_nodes

    @property
    def max_depth(self) -> int:
        return self.inner.max_depth

    @property
    def scratch(self) -> int:
        return self.inner.scratch

    def init(self, target, batch, capacity):
        empty = jnp.zeros((batch, self.num_nodes), jnp.int32)
        return Recorded(inner=self.inner.init(target, batch, capacity), tokens=empty, parents=empty)

    def prefill(self, target, state, chunk):
        return replace(state, inner=self.inner.prefill(target, state.inner, chunk))

    def propose(self, target, cache, state, root, lengths, keys, sampling):
        out = self.inner.propose(target, cache, state.inner, root, lengths, keys, sampling)
        kept = Recorded(inner=out.state, tokens=out.tree.tokens, parents=out.tree.parents)
        return replace(out, state=kept)

    def commit(self, target, state, lengths, verified):
        return replace(state, inner=self.inner.commit(target, state.inner, lengths, verified))

    def rollback(self, state, lengths, root, features):
        inner = self.inner.rollback(state.inner, lengths, root, features)
        return replace(state, inner=inner)
