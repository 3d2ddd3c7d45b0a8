"""Hierarchical speculation (SpecMQuant, arXiv 2505.22179, HierSpec).

A smaller model drafts a chain for the target and is itself accelerated by an inner drafter.

Verification by the smaller model is lossless, so the chain is its own continuation of the text; the target pays for a
short chain in place of a wide tree. Notation: D is the smaller model, X the inner drafter.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from specjax import verify
from specjax.decoding import sampling as sample
from specjax.decoding import target as passes
from specjax.decoding import tree as trees
from specjax.drafters import base, common_vocabulary, draft_model, options
from specjax.drafters import chain as chains
from specjax.models import cache as kv
from specjax.models.llama import Llama
from specjax.verify.base import Verified


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class HierarchicalState:
    """What D and X know of each sequence. X's text is always D's: `valid` tokens, then `last`.

    Attributes:
        cache: D's cache; slots 0 .. valid - 1 hold the text.
        inner: X's state.
        features: D's features by position, for X, below `valid`; None where X needs none.
        valid: tokens that D has processed. C <= valid while a chain is out; valid = C or C - 1 when the target has
            answered (C - 1: it accepted the whole chain, whose last token D has not processed).
        last: token at position `valid`.
        rounds: inner rounds of the chain that is out, by number of X's drafts that D accepted.
        acceptance_histogram: the same of all chains that the target has answered.
    """

    cache: kv.KVCache
    inner: Any
    features: Float[Array, "B S A"] | None
    valid: Int[Array, "B"]
    last: Int[Array, "B"]
    rounds: Int[Array, "B P"]
    acceptance_histogram: Int[Array, "B P"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _Chain:
    """The chain while it grows.

    Attributes:
        state: D and X, which stand at its end.
        tokens: drafted tokens, junk from `length` on.
        q: D's distribution of each, None when greedy.
        length: tokens drafted so far.
    """

    state: HierarchicalState
    tokens: Int[Array, "B n"]
    q: Float[Array, "B n V"] | None
    length: Int[Array, "B"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Hierarchical:
    """Drafts a chain of at least `min_draft_depth` tokens with `model` under the drafter `inner`.

    Attributes:
        model: D, a language model with the target's tokenizer.
        inner: X, any drafter for D.
        min_draft_depth: inner rounds go on until the chain is this long; it may end up `inner.max_depth` longer.
    """

    model: Llama
    inner: base.Drafter
    min_draft_depth: int = field(default=6, metadata={"static": True})

    needs = None

    @property
    def num_nodes(self) -> int:
        return self.max_depth + 1

    @property
    def max_depth(self) -> int:
        return self.min_draft_depth + self.inner.max_depth

    @property
    def scratch(self) -> int:
        return self.max_depth + max(self.inner.scratch, 2)

    def fitted(self, vocab_size: int) -> "Hierarchical":
        """The same over a target's vocabulary, whatever the padding of the models' own."""
        inner = self.inner.fitted(vocab_size) if hasattr(self.inner, "fitted") else self.inner
        model = common_vocabulary.fitted(self.model, vocab_size)
        return replace(self, model=model, inner=inner)

    def init(self, target, batch, capacity):
        inner = self.inner.init(self.model, batch, capacity)
        features = None
        if self.inner.needs is not None:
            layers_read = len(self.inner.needs) if isinstance(self.inner.needs, tuple) else 1
            width = layers_read * self.model.config.hidden_size
            features = jnp.zeros((batch, capacity, width), self.model.dtype)
        zeros = jnp.zeros((batch,), jnp.int32)
        cache = kv.init(self.model.config, batch, capacity, self.model.dtype)
        rounds = jnp.zeros((batch, self.inner.max_depth + 1), jnp.int32)
        return HierarchicalState(
            cache=cache,
            inner=inner,
            features=features,
            valid=zeros,
            last=zeros,
            rounds=rounds,
            acceptance_histogram=rounds,
        )

    def prefill(self, target, state, chunk):
        out, features = passes.forward_chunk(
            self.model, chunk.tokens, chunk.start, state.cache, self.inner.needs
        )
        inner = self.inner.prefill(self.model, state.inner, replace(chunk, features=features))
        return replace(
            state,
            cache=out.cache,
            inner=inner,
            features=_write_features(state.features, features, chunk.start, chunk.valid),
            valid=jnp.where(chunk.valid > 0, chunk.start + chunk.valid, state.valid),
        )

    def propose(self, target, cache, state, root, lengths, keys, sampling) -> base.Proposal:
        batch, most = root.shape[0], self.max_depth
        vocab = self.model.config.vocab_size
        chain = _Chain(
            state=replace(state, rounds=jnp.zeros_like(state.rounds)),
            tokens=jnp.zeros((batch, most), jnp.int32),
            q=None if sampling.greedy else jnp.zeros((batch, most, vocab), jnp.float32),
            length=jnp.zeros((batch,), jnp.int32),
        )
        behind = state.valid < lengths
        chain = lax.cond(
            jnp.any(behind),
            lambda chain: self._catch_up(chain, behind, root, sample.fold(keys, 0), sampling),
            lambda chain: chain,
            chain,
        )
        now = replace(chain.state, last=jnp.where(behind, chain.state.last, root))
        chain = lax.while_loop(
            lambda chain: jnp.any(chain.length < self.min_draft_depth),
            lambda chain: self._round(chain, keys, sampling),
            replace(chain, state=now),
        )
        return base.Proposal(
            tree=trees.chain(root, chain.tokens, chain.length),
            q=chains.with_root(chain.q),
            cache=cache,
            state=chain.state,
        )

    def _catch_up(self, chain: _Chain, behind, root, keys, sampling) -> _Chain:
        """Where the whole last chain was accepted: D reads its last token and the root, and drafts the first token."""
        state = chain.state
        tokens = jnp.stack([jnp.where(behind, state.last, root), root], axis=1)
        out, features = passes.forward_chunk(
            self.model, tokens, state.valid, state.cache, self.inner.needs
        )
        logits = self.model.logits(out.hidden[:, 1])
        first = sample.choose(keys, logits, sampling)
        taken = Verified(
            path=jnp.zeros_like(tokens),
            length=jnp.where(behind, 2, 0),
            tokens=jnp.stack([root, first], axis=1),
            next_token=first,
            features=features,
        )
        probs = None if sampling.greedy else sample.probabilities(logits, sampling)[:, None]
        state = self._advance(replace(state, cache=out.cache), taken)
        # Of the two new tokens the root is the target's; only the second one is drafted.
        return self._append(chain, state, first[:, None], probs, behind.astype(jnp.int32))

    def _round(self, chain: _Chain, keys, sampling) -> _Chain:
        """One inner step: X proposes, D verifies; sequences whose chain is long enough take no part."""
        # By the sequence's own progress, not by a count of rounds, which depends on its neighbours in the batch.
        keys = sample.fold(keys, chain.length + 1)
        state = chain.state
        drafted = self.inner.propose(
            self.model,
            state.cache,
            state.inner,
            state.last,
            state.valid,
            sample.fold(keys, 0),
            sampling,
        )
        # Heads of a model with more padding than the target may name tokens that are none of its.
        tokens = jnp.minimum(drafted.tree.tokens, self.model.config.vocab_size - 1)
        drafted = replace(drafted, tree=replace(drafted.tree, tokens=tokens))
        short = chain.length < self.min_draft_depth
        logits, features, cache, tree = passes.forward_tree(
            self.model, drafted.tree, drafted.cache, state.valid, self.inner.needs, live=short
        )
        rule = verify.acceptor("lossless", sampling.greedy)
        taken = rule(tree, drafted.q, logits, sample.fold(keys, 1), sampling)
        if not tree.is_chain:
            cache = kv.compact(cache, state.valid, taken.path, self.model.backend)
        rows = taken.path[..., None]
        probs = None
        if not sampling.greedy:
            probs = sample.probabilities(jnp.take_along_axis(logits, rows, axis=1), sampling)
        if features is not None:
            taken = replace(taken, features=jnp.take_along_axis(features, rows, axis=1))
        taken = replace(taken, length=jnp.where(short, taken.length, 0))
        state = self._advance(replace(state, cache=cache, inner=drafted.state), taken)
        # A length of 0 is no class and counts nowhere.
        counted = jax.nn.one_hot(taken.length - 1, self.inner.max_depth + 1, dtype=jnp.int32)
        state = replace(state, rounds=state.rounds + counted)
        return self._append(chain, state, taken.tokens, probs, taken.length)

    def _advance(self, state: HierarchicalState, taken: Verified) -> HierarchicalState:
        """D has processed `taken.length` more tokens; X takes in their features and successors."""
        features = _write_features(state.features, taken.features, state.valid, taken.length)
        return replace(
            state,
            inner=self.inner.commit(self.model, state.inner, state.valid, taken),
            features=features,
            valid=state.valid + taken.length,
            last=jnp.where(taken.length > 0, taken.next_token, state.last),
        )

    def _append(self, chain: _Chain, state, tokens, probs, count) -> _Chain:
        column = jnp.arange(tokens.shape[1])
        slots = jnp.where(
            column < count[:, None], chain.length[:, None] + column, chain.tokens.shape[1]
        )
        rows = jnp.arange(slots.shape[0])[:, None]
        return _Chain(
            state=state,
            tokens=chain.tokens.at[rows, slots].set(tokens, mode="drop"),
            q=None if probs is None else chain.q.at[rows, slots].set(probs, mode="drop"),
            length=chain.length + count,
        )

    def commit(self, target, state, lengths, verified):
        # A sequence that took no part goes back to where it stood before its chain was drafted.
        took_part = verified.length > 0
        rounds = jnp.where(took_part[:, None], state.rounds, 0)
        state = replace(state, acceptance_histogram=state.acceptance_histogram + rounds)
        lengths = lengths + verified.length
        return self._shorten(state, lengths, verified.next_token, took_part)

    def rollback(self, state, lengths, root, features):
        return self._shorten(state, lengths, root, jnp.ones(lengths.shape, bool))

    def inner_acceptance(self, state):
        return state.acceptance_histogram

    def _shorten(self, state: HierarchicalState, lengths, root, known) -> HierarchicalState:
        """Cuts the text to `lengths` tokens and `root`, where that is shorter than what D has processed."""
        cut = lengths <= state.valid
        valid = jnp.where(cut, lengths, state.valid)
        last = jnp.where(cut & known, root, state.last)
        row = None
        if state.features is not None:
            before = jnp.maximum(valid - 1, 0)[:, None, None]
            row = jnp.take_along_axis(state.features, before, axis=1)[:, 0]
        # Rolling back to the present length changes nothing, so no sequence has to be left out.
        inner = self.inner.rollback(state.inner, valid, last, row)
        return replace(state, inner=inner, valid=valid, last=last)


def _write_features(features, rows, start: Int[Array, "B"], count: Int[Array, "B"]):
    """Features of the first `count` rows at positions start, start + 1, ...; None where X needs none."""
    if features is None:
        return None
    column = jnp.arange(rows.shape[1])
    slots = jnp.where(column < count[:, None], start[:, None] + column, features.shape[1])
    return features.at[jnp.arange(rows.shape[0])[:, None], slots].set(rows, mode="drop")


def build(
    target,
    registry,
    model: str,
    inner: Any,
    min_draft_depth: int = 6,
    scheme: str | None = None,
    quantize: str | None = None,
) -> Hierarchical:
    """Loads the draft model and builds the inner drafter, a spec, for it."""
    options.lengths(target, min_draft_depth=min_draft_depth)
    draft = draft_model.load(
        target, model, scheme, quantize, keep_codes=registry.needs_codes(inner)
    )
    drafter = Hierarchical(
        model=draft.module, inner=registry.build(inner, draft), min_draft_depth=min_draft_depth
    )
    return drafter.fitted(target.config.vocab_size)
