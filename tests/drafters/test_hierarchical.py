"""Hierarchical drafting: its chain is the intermediate model's own, and every cache holds what it claims to hold.

The steps below are driven by hand: the outer target's answer is one token, two, or the whole chain, then a token that
nobody drafted. Names as in `specjax.drafters.hierarchical`: D is the intermediate model, X the inner drafter.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.decoding import sampling as sample
from specjax.decoding import target as passes
from specjax.decoding import tree as trees
from specjax.drafters.base import Chunk
from specjax.drafters.eagle import eagle
from specjax.drafters.hierarchical import Hierarchical
from specjax.models import cache as kv
from specjax.models import layers
from specjax.verify.base import Verified
from tests import tiny

CAPACITY, WIDTH = 96, 64
MIN_DEPTH, LEVELS = 2, 2
FULL = 99
# What the target accepts of each sequence's chain, step by step, the bonus token included.
PLAN = ((FULL, 1), (2, FULL), (1, 2), (FULL, FULL), (1, 1), (2, 2))
GREEDY = sample.sampling()
JUNK = 1e4


def model():
    return tiny.fixture_model()


@functools.cache
def drafter() -> Hierarchical:
    inner = eagle(tiny.fixture_head(), draft_depth=LEVELS, topk=3, num_nodes=8)
    return Hierarchical(model=model(), inner=inner, min_draft_depth=MIN_DEPTH)


def hurried(function):
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@hurried
def prefill(drafter, tokens, lengths):
    chunk = Chunk(
        tokens=tokens[:, :-1],
        next_tokens=tokens[:, 1:],
        start=jnp.zeros_like(lengths),
        valid=lengths,
        features=None,
    )
    state = drafter.init(drafter.model, tokens.shape[0], CAPACITY)
    return drafter.prefill(drafter.model, state, chunk)


@hurried
def propose(drafter, state, root, lengths):
    keys = sample.request_keys(0, np.arange(2))
    empty = kv.init(drafter.model.config, 2, 1, jnp.float32)
    out = drafter.propose(drafter.model, empty, state, root, lengths, keys, GREEDY)
    return out.tree.tokens, trees.num_draft_tokens(out.tree), out.state


@hurried
def commit(drafter, state, lengths, verified):
    return drafter.commit(drafter.model, state, lengths, verified)


@hurried
def fresh(drafter, tokens):
    """D's features and cache and X's cache for whole texts, computed at once."""
    start = jnp.zeros((tokens.shape[0],), jnp.int32)
    cache = kv.init(drafter.model.config, tokens.shape[0], WIDTH, jnp.float32)
    out, features = passes.forward_chunk(drafter.model, tokens[:, :-1], start, cache, "final")
    head = drafter.inner.head
    own = kv.init(head.config, tokens.shape[0], WIDTH, jnp.float32, num_layers=1)
    block = layers.causal_block(tokens[:, 1:], start)
    _, own = head(head.fuse(features), block, own, drafter.model)
    return features, out.cache, own


@dataclass(kw_only=True)
class Moment:
    """The drafter's state at some point, and the texts that it then stands for.

    Attributes:
        texts: tokens of each sequence, the root or the last drafted token included.
    """

    state: Any
    texts: list[list[int]]


def padded(texts, width: int) -> np.ndarray:
    tokens = np.zeros((len(texts), width), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    return tokens


def answer(chain: list[int], accepted: int, number: int) -> list[int]:
    """New tokens of a step: accepted drafts, then a token that is not the next draft."""
    kept = chain[: min(accepted, len(chain) + 1) - 1]
    bonus = (chain[len(kept)] + 1 + number) % 1000 if len(kept) < len(chain) else 17 + number
    return [*kept, bonus]


@functools.cache
def moments() -> tuple[list[Moment], list[Moment], list[list[list[int]]]]:
    """After every proposal, after every commit (the first one: after the prompts), and the chains."""
    texts = [tiny.prompts()[0][:5], tiny.prompts()[1][:9]]
    lengths = np.asarray([len(text) for text in texts], np.int32)
    state = prefill(drafter(), jnp.asarray(padded(texts, 12)), jnp.asarray(lengths))
    texts = [[*text, 40 + row] for row, text in enumerate(texts)]
    drafted, committed, chains = [], [Moment(state=state, texts=texts)], []
    for number, accepted in enumerate(PLAN):
        root = jnp.asarray([text[-1] for text in texts], jnp.int32)
        tokens, counts, state = propose(drafter(), state, root, jnp.asarray(lengths))
        chain = [np.asarray(tokens)[b, 1 : 1 + counts[b]].tolist() for b in range(2)]
        chains.append(chain)
        full = [text + new for text, new in zip(texts, chain, strict=True)]
        drafted.append(Moment(state=state, texts=full))
        new = [answer(*pair, number) for pair in zip(chain, accepted, strict=True)]
        rows = drafter().max_depth + 1
        verified = Verified(
            path=jnp.broadcast_to(jnp.arange(rows), (2, rows)),
            length=jnp.asarray([len(row) for row in new], jnp.int32),
            tokens=jnp.asarray(padded(new, rows)),
            next_token=jnp.asarray([row[-1] for row in new], jnp.int32),
        )
        state = commit(drafter(), state, jnp.asarray(lengths), verified)
        texts = [text + row for text, row in zip(texts, new, strict=True)]
        lengths = lengths + np.asarray([len(row) for row in new], np.int32)
        committed.append(Moment(state=state, texts=texts))
    return drafted, committed, chains


def test_the_chain_is_the_intermediate_models_own():
    _, committed, chains = moments()
    sizes = set()
    for moment, chain in zip(committed[:-1], chains, strict=True):
        expected = tiny.greedy(model(), moment.texts, MIN_DEPTH + LEVELS)
        for text, new, full in zip(moment.texts, chain, expected, strict=True):
            assert MIN_DEPTH <= len(new) <= MIN_DEPTH + LEVELS
            assert new == full[len(text) : len(text) + len(new)]
            sizes.add(len(new))
    assert len(sizes) > 1, "rounds of one length only"


EVERY = [("drafted", i) for i in range(len(PLAN))]
EVERY += [("committed", i) for i in range(len(PLAN) + 1)]


def moment(kind: str, index: int) -> Moment:
    return moments()[kind == "committed"][index]


@pytest.mark.parametrize(("kind", "index"), EVERY)
def test_x_lacks_exactly_its_pending_rows(kind, index):
    """Invariant (i): rows in X's cache and pending rows add up to the position of X's root."""
    state = moment(kind, index).state
    inner = state.inner
    assert (inner.pending.start + inner.pending.count == state.valid).all()
    assert (inner.pending.count >= 1).all()


def close(found, expected) -> bool:
    return np.abs(np.asarray(found) - np.asarray(expected)).max(initial=0) < 1e-4


@pytest.mark.parametrize(("kind", "index"), EVERY)
def test_caches_hold_true_pairs_of_the_text(kind, index):
    """Invariants (ii) and (iii): D's rows are those of the text, and X's those of D's features and next tokens."""
    now = moment(kind, index)
    features, own, inner_cache = fresh(drafter(), jnp.asarray(padded(now.texts, WIDTH + 1)))
    state, inner = now.state, now.state.inner
    for b, text in enumerate(now.texts):
        valid, start = int(state.valid[b]), int(inner.pending.start[b])
        # D has read all but the root, or, where its whole chain was accepted, all but the last draft and the root.
        assert len(text) - valid in ((1,) if kind == "drafted" else (1, 2))
        if kind == "drafted":
            assert text[valid] == state.last[b]
        for found, expected in zip(jax.tree.leaves(state.cache), jax.tree.leaves(own), strict=True):
            assert close(found[b, :, :valid], expected[b, :, :valid])
        assert close(state.features[b, :valid], features[b, :valid])
        for found, expected in zip(
            jax.tree.leaves(inner.cache), jax.tree.leaves(inner_cache), strict=True
        ):
            assert close(found[b, :, :start], expected[b, :, :start])
        rows = int(inner.pending.count[b])
        assert close(inner.pending.features[b, :rows], features[b, start : start + rows])
        known = np.asarray(inner.pending.tokens)[b, : rows - 1].tolist()
        assert known == text[start + 1 : start + rows]


def test_all_ways_of_answering_occurred():
    """The whole chain; less than it, but beyond where X's last tree began; and less than that."""
    drafted, committed, _ = moments()
    cases = set()
    for before, after in zip(drafted, committed[1:], strict=True):
        for b in range(2):
            if len(after.texts[b]) > len(before.texts[b]):
                cases.add("full")
            elif len(after.texts[b]) - 1 > int(before.state.inner.pending.start[b]):
                cases.add("kept pending rows")
            else:
                cases.add("behind the last tree")
    assert cases == {"full", "kept pending rows", "behind the last tree"}


@pytest.mark.parametrize("index", range(len(PLAN)))
def test_what_lies_beyond_the_text_is_never_seen(index):
    """Invariant (iv), for the caches of D and X: junk there changes no chain."""
    now = moment("committed", index)
    state, inner = now.state, now.state.inner
    slots = jnp.arange(CAPACITY)

    def poisoned(leaf, first):
        return jnp.where((slots >= first[:, None])[:, None, :, None], JUNK, leaf)

    cache = jax.tree.map(lambda leaf: poisoned(leaf, state.valid), state.cache)
    own = jax.tree.map(lambda leaf: poisoned(leaf, inner.pending.start), inner.cache)
    features = jnp.where((slots >= state.valid[:, None])[..., None], JUNK, state.features)
    inner = replace(inner, cache=own, in_cache=jnp.zeros_like(inner.in_cache))
    dirty = replace(state, cache=cache, inner=inner, features=features)
    root = jnp.asarray([text[-1] for text in now.texts], jnp.int32)
    lengths = jnp.asarray([len(text) - 1 for text in now.texts], jnp.int32)
    tokens, counts, _ = propose(drafter(), dirty, root, lengths)
    chain = [np.asarray(tokens)[b, 1 : 1 + counts[b]].tolist() for b in range(2)]
    assert chain == moments()[2][index]


def test_the_target_never_sees_what_lies_beyond_its_text():
    """Invariant (iv), for the target: a chain is scored the same whatever the slots from its root on held."""
    text = tiny.prompts()[2]
    tokens = jnp.asarray(text, jnp.int32)[None]
    start = jnp.zeros((1,), jnp.int32)
    chain = trees.chain(jnp.asarray([7], jnp.int32), jnp.asarray([[8, 9, 10]], jnp.int32))

    @hurried
    def logits(target, junk):
        cache = kv.init(target.config, 1, CAPACITY, jnp.float32)
        cache = jax.tree.map(lambda leaf: leaf + junk, cache)
        out, _ = passes.forward_chunk(target, tokens, start, cache, None)
        return passes.forward_tree(target, chain, out.cache, start + len(text), None)[0]

    clean, dirty = (np.asarray(logits(model(), jnp.float32(junk))) for junk in (0.0, JUNK))
    assert (clean == dirty).all()


@pytest.mark.slow
@pytest.mark.usefixtures("hurried")
def test_inner_rounds_are_counted_while_a_request_runs():
    prompts = tiny.prompts()[:2]
    jobs = tiny.requests(prompts, [6, 20])
    together = tiny.run(tiny.engine(model(), drafter()), jobs, 2)
    for job, done in zip(jobs, together, strict=True):
        [alone] = tiny.run(tiny.engine(model(), drafter()), [job], 1)
        inner = done.metrics.inner_acceptance_histogram
        assert len(inner) == LEVELS + 1
        assert inner == alone.metrics.inner_acceptance_histogram
        # The rest of the chains' tokens are those that D drafts when it catches up, at most one a step.
        drafted = sum((1 + accepted) * count for accepted, count in enumerate(inner))
        assert 0 <= done.metrics.num_draft_tokens - drafted <= done.metrics.num_spec_steps
    [plain] = tiny.run(tiny.engine(model(), tiny.DRAFTERS["ngram"](None)), jobs[:1], 1)
    assert plain.metrics.inner_acceptance_histogram is None
