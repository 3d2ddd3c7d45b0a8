"""What every drafter promises to the loop: shapes that stay, rows that idle, scratch, and rollback."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import verify
from specjax.decoding import sampling as sample
from specjax.decoding import target as target_pass
from specjax.drafters import registry
from specjax.drafters.base import Chunk
from specjax.engine import decode as decoding
from specjax.models import cache as kv
from specjax.verify.base import Verified
from tests import planned, tiny

# A prime, so that an axis of this size is an axis of cache slots.
CAPACITY = 61
CONFIG = tiny.config(num_layers=1)
PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8])
LENGTHS = jnp.asarray([len(prompt) for prompt in PROMPTS], jnp.int32)
GREEDY, SAMPLED = sample.sampling(), sample.sampling(1.0)
NO_STOP = jnp.asarray([-1], jnp.int32)


@functools.cache
def target():
    return tiny.model(CONFIG)


@functools.cache
def parts():
    return tiny.Parts(target(), noise=0.1)


PLANNED = {
    "planned-tree": lambda parts: planned.planned([[0]], [1], planned.TREE, CONFIG.vocab_size),
}
DRAFTERS = tiny.DRAFTERS | PLANNED


@functools.cache
def build(name: str):
    return DRAFTERS[name](parts())


def padded(texts) -> np.ndarray:
    """Tokens [B, 33], zeros behind."""
    tokens = np.zeros((len(texts), 33), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    return tokens


def begin(model, drafter, tokens, lengths, sampling) -> decoding.DecodeState:
    """A state that has taken in texts and chosen their next token."""
    batch = tokens.shape[0]
    state = decoding.init_state(model, drafter, batch, CAPACITY, 32)
    keys = sample.request_keys(0, np.arange(batch))
    state = replace(state, keys=keys, limit=jnp.full((batch,), 32, jnp.int32))
    chunk = Chunk(
        tokens=tokens[:, :-1],
        next_tokens=tokens[:, 1:],
        start=jnp.zeros((batch,), jnp.int32),
        valid=lengths,
        features=None,
    )
    return decoding.prefill_chunk(model, drafter, state, chunk, lengths, NO_STOP, sampling)


def form(tree):
    """Structure, shapes and dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_states_keep_structure_shapes_and_dtypes(name, sampling):
    drafter = build(name)

    def all_methods(model):
        tokens = jnp.asarray(padded(PROMPTS))
        empty = drafter.init(model, 2, CAPACITY)
        state = begin(model, drafter, tokens, LENGTHS, sampling)
        where = state.root, state.lengths, state.keys
        proposal = drafter.propose(model, state.cache, state.draft, *where, sampling)
        logits, features, _, tree = target_pass.forward_tree(
            model, proposal.tree, proposal.cache, state.lengths, drafter.needs
        )
        rule = verify.acceptor("lossless", sampling.greedy)
        verified = rule(tree, proposal.q, logits, state.keys, sampling)
        if features is not None:
            rows = jnp.take_along_axis(features, verified.path[..., None], axis=1)
            verified = replace(verified, features=rows)
        after = drafter.commit(model, proposal.state, state.lengths, verified)
        last = None if features is None else features[:, 0]
        back = drafter.rollback(after, state.lengths, state.root, last)
        states = empty, state.draft, proposal.state, after, back
        return states, proposal, verified

    states, proposal, verified = jax.eval_shape(all_methods, target())
    for state in states[1:]:
        assert form(state) == form(states[0])
    for leaf in jax.tree.leaves(states[0]):
        assert leaf.shape[0] == 2, "the batch is not the leading axis"
    assert proposal.tree.tokens.shape == proposal.tree.parents.shape == (2, drafter.num_nodes)
    assert proposal.tree.max_depth == drafter.max_depth
    assert verified.path.shape == (2, drafter.max_depth + 1)
    assert form(proposal.cache) == form(jax.eval_shape(lambda: kv.init(CONFIG, 2, CAPACITY, "f4")))
    if proposal.q is not None:
        assert not sampling.greedy
        assert proposal.q.shape == (2, drafter.num_nodes, CONFIG.vocab_size)
    assert drafter.scratch >= drafter.num_nodes


@pytest.mark.parametrize("name", DRAFTERS)
def test_drafters_hold_no_array_of_the_target(name):
    held = {id(leaf) for leaf in jax.tree.leaves(build(name))}
    assert not held & {id(leaf) for leaf in jax.tree.leaves(target())}


def hurried(function):
    """Compiled once per drafter, and in a hurry."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@hurried
def prefilled(model, drafter, tokens, lengths):
    return begin(model, drafter, tokens, lengths, GREEDY)


@hurried
def step(model, drafter, state):
    return decoding.step(model, drafter, state, NO_STOP, GREEDY, verify.Greedy())


@hurried
def propose(model, drafter, cache, draft, root, lengths):
    keys = sample.request_keys(0, np.arange(2))
    return drafter.propose(model, cache, draft, root, lengths, keys, GREEDY)


@hurried
def commit(model, drafter, draft, lengths, verified):
    return drafter.commit(model, draft, lengths, verified)


@hurried
def rollback(drafter, draft, lengths, root, features):
    return drafter.rollback(draft, lengths, root, features)


@functools.cache
def walk(name: str) -> list[decoding.DecodeState]:
    """States after the prompts and after each of three steps."""
    states = [prefilled(target(), build(name), jnp.asarray(padded(PROMPTS)), LENGTHS)]
    for _ in range(3):
        states.append(step(target(), build(name), states[-1]))
    return states


# What holds no state of its own, and what another one stands for, runs with the slow tests.
SLOW = ("self", "eagle3", "eagle-reduced", "head", "one-pass", "pard", "suffix", "merge", "nested")
BEHAVIOURS = [
    pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
    for name in DRAFTERS
    if name != "none"
]


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_sequences_that_take_no_part_propose_the_same_again(name):
    drafter, state = build(name), walk(name)[1]
    before = propose(target(), drafter, state.cache, state.draft, state.root, state.lengths)
    rows = drafter.max_depth + 1
    count = jnp.asarray([0, rows], jnp.int32)
    tokens = jnp.full((2, rows), 3, jnp.int32)
    features = None
    if drafter.needs is not None:
        states = len(drafter.needs) if isinstance(drafter.needs, tuple) else 1
        features = jnp.ones((2, rows, states * CONFIG.hidden_size), jnp.float32)
    verified = Verified(
        path=jnp.broadcast_to(jnp.arange(rows), (2, rows)),
        length=count,
        tokens=tokens,
        next_token=tokens[:, -1],
        features=features,
    )
    draft = commit(target(), drafter, before.state, state.lengths, verified)
    root = jnp.where(count > 0, verified.next_token, state.root)
    after = propose(target(), drafter, state.cache, draft, root, state.lengths + count)
    assert before.tree.tokens[0].tolist() == after.tree.tokens[0].tolist()
    assert before.tree.parents[0].tolist() == after.tree.parents[0].tolist()
    assert before.tree.tokens[1].tolist() != after.tree.tokens[1].tolist()


forward_chunk = jax.jit(target_pass.forward_chunk, static_argnames="needs")


def features_at(tokens, positions, needs):
    """What a drafter needs of the target at one position of each text."""
    if needs is None:
        return None
    cache = kv.init(CONFIG, 2, CAPACITY, jnp.float32)
    start = jnp.zeros_like(positions)
    _, rows = forward_chunk(target(), tokens, start, cache, needs=needs)
    return rows[jnp.arange(2), positions]


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_rollback_and_a_fresh_prefill_propose_the_same(name):
    """From one to all tokens of the last steps are taken back, differently in each sequence."""
    drafter, states = build(name), walk(name)
    last = states[-1]
    texts = [
        [*prompt, *np.asarray(last.tokens[row, : last.num_tokens[row]]).tolist()]
        for row, prompt in enumerate(PROMPTS)
    ]
    tokens = jnp.asarray(padded(texts))
    for index in (0, 2, 3):
        # One token further than where a step ended, where there is such a token.
        lengths = jnp.minimum(states[index].lengths + jnp.asarray([0, 1]), last.lengths)
        root = tokens[jnp.arange(2), lengths]
        fresh = prefilled(target(), drafter, tokens, lengths)
        features = features_at(tokens, lengths - 1, drafter.needs)
        draft = rollback(drafter, last.draft, lengths, root, features)
        back = propose(target(), drafter, last.cache, draft, root, lengths).tree
        new = propose(target(), drafter, fresh.cache, fresh.draft, root, lengths).tree
        used = (np.asarray(back.parents) >= 0) & (np.asarray(new.parents) >= 0)
        assert (np.asarray(back.tokens) == np.asarray(new.tokens))[used].all(), index
        if name == "nested":
            # Where inner rounds begin shifts how far the last one reaches, not what the chain says.
            assert (used.sum(1) >= drafter.min_draft_depth).all()
        else:
            assert (back.parents == new.parents).all(), index


@pytest.mark.parametrize("name", ["lm", "eagle", "hierarchical"])
def test_steps_write_only_within_the_scratch_that_they_declare(name):
    """In the target's cache and in the drafter's own."""

    def caches(state):
        leaves = jax.tree.leaves((state.cache, state.draft))
        return [leaf for leaf in leaves if leaf.ndim == 4 and leaf.shape[2] == CAPACITY]

    _, state, after, _ = walk(name)
    for before, now in zip(caches(state), caches(after), strict=True):
        for row, length in enumerate(state.lengths.tolist()):
            slots = np.flatnonzero(np.asarray(before != now)[row].any(axis=(0, 2)))
            assert (slots < length + build(name).scratch).all(), (slots, length)


def test_every_kind_of_the_registry_is_tested_here():
    assert set(registry.kinds()) <= set(DRAFTERS)
