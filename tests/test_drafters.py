"""What every drafter promises to the loop: shapes that stay, rows that idle, scratch, and rollback."""

import functools
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import cache as kv
from specjax import decode as decoding
from specjax import sampling as sample
from specjax import target as target_pass
from specjax import verify
from specjax.drafters import registry
from specjax.drafters.base import Chunk
from specjax.drafters.eagle import eagle
from specjax.drafters.hierarchical import Hierarchical
from specjax.drafters.lm import LM
from specjax.drafters.medusa import default_choices, medusa
from specjax.drafters.ngram import Ngram
from specjax.drafters.none import NoDraft
from specjax.drafters.self_draft import SelfDraft
from specjax.models import eagle3
from specjax.models import medusa as medusa_heads
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


def draft_model(scale: float = 0.1):
    return tiny.noisy(target(), scale)


def eagle3_head():
    return eagle3.build(
        tiny.RandomCheckpoint(CONFIG, 5),
        jnp.float32,
        layer_ids=(0,),
        target_width=CONFIG.hidden_size,
        num_drafts=CONFIG.vocab_size,
    )


def medusa_drafter():
    heads = medusa_heads.build(tiny.RandomCheckpoint(CONFIG, 6), CONFIG, 3, jnp.float32)
    return medusa(heads, default_choices(3, num_nodes=8, topk=3))


def nested():
    inner = Hierarchical(model=draft_model(0.2), inner=Ngram(draft_depth=2), min_draft_depth=2)
    return Hierarchical(model=draft_model(), inner=inner, min_draft_depth=3)


DRAFTERS: dict[str, Callable] = {
    "none": NoDraft,
    "ngram": lambda: Ngram(draft_depth=4, ngram_max=3, ngram_min=1),
    "lm": lambda: LM(model=draft_model(), draft_depth=3),
    "self": lambda: SelfDraft(draft_depth=3),
    "eagle": lambda: eagle(tiny.head(CONFIG), draft_depth=3, topk=2, num_nodes=8),
    "eagle3": lambda: eagle(eagle3_head(), draft_depth=3, topk=2, num_nodes=8),
    "medusa": medusa_drafter,
    "hierarchical": lambda: Hierarchical(
        model=draft_model(), inner=eagle(tiny.head(CONFIG), 2, 2, 5), min_draft_depth=3
    ),
    "nested": nested,
    "planned-tree": lambda: planned.planned([[0]], [1], planned.TREE, CONFIG.vocab_size),
}


@functools.cache
def build(name: str):
    return DRAFTERS[name]()


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


def propose(model, drafter, state, draft=None, root=None, lengths=None, sampling=GREEDY):
    """The drafter's proposal where `state` stands, or elsewhere."""
    return drafter.propose(
        model,
        state.cache,
        state.draft if draft is None else draft,
        state.root if root is None else root,
        state.lengths if lengths is None else lengths,
        sample.fold(state.keys, 7),
        sampling,
    )


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
        proposal = propose(model, drafter, state, sampling=sampling)
        logits, features, _, tree = target_pass.forward_tree(
            model, proposal.tree, proposal.cache, state.lengths, drafter.needs
        )
        rule = verify.acceptor("auto", sampling.greedy)
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


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def walk(model, drafter, tokens, lengths):
    """States after the prompts and after each of three steps."""
    first = begin(model, drafter, tokens, lengths, GREEDY)

    def step(state, _):
        new = decoding.step(model, drafter, state, NO_STOP, GREEDY, verify.Greedy())
        return new, new

    return first, jax.lax.scan(step, first, None, 3)[1]


def at(states, index: int):
    return jax.tree.map(lambda leaf: leaf[index], states)


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def idle_then_propose(model, drafter, state):
    """Proposals before and after a step in which sequence 0 took no part."""
    before = propose(model, drafter, state)
    rows = drafter.max_depth + 1
    count = jnp.asarray([0, rows], jnp.int32)
    features = None
    if drafter.needs is not None:
        features = jnp.ones((2, rows, CONFIG.hidden_size), jnp.float32)
    tokens = jnp.full((2, rows), 3, jnp.int32)
    verified = Verified(
        path=jnp.broadcast_to(jnp.arange(rows), (2, rows)),
        length=count,
        tokens=tokens,
        next_token=tokens[:, -1],
        features=features,
    )
    draft = drafter.commit(model, before.state, state.lengths, verified)
    root = jnp.where(count > 0, verified.next_token, state.root)
    after = propose(model, drafter, state, draft, root, state.lengths + count)
    return before.tree, after.tree


@pytest.mark.parametrize("name", [name for name in DRAFTERS if name != "none"])
def test_sequences_that_take_no_part_propose_the_same_again(name):
    drafter = build(name)
    _, states = walk(target(), drafter, jnp.asarray(padded(PROMPTS)), LENGTHS)
    before, after = idle_then_propose(target(), drafter, at(states, 1))
    assert before.tokens[0].tolist() == after.tokens[0].tolist()
    assert before.parents[0].tolist() == after.parents[0].tolist()
    assert before.tokens[1].tolist() != after.tokens[1].tolist()


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def roll_back(model, drafter, state, tokens, lengths):
    """Proposals for texts shorter than `state`'s: after rolling back, and after a fresh prefill."""
    rows = jnp.arange(tokens.shape[0])
    root = tokens[rows, lengths]
    fresh = begin(model, drafter, tokens, lengths, GREEDY)
    features = None
    if drafter.needs is not None:
        cache = kv.init(CONFIG, tokens.shape[0], CAPACITY, jnp.float32)
        start = jnp.zeros_like(lengths)
        _, read = target_pass.forward_chunk(model, tokens, start, cache, drafter.needs)
        features = read[rows, lengths - 1]
    draft = drafter.rollback(state.draft, lengths, root, features)
    back = propose(model, drafter, state, draft, root, lengths)
    new = propose(model, drafter, fresh, root=root, lengths=lengths)
    return back.tree, new.tree


@pytest.mark.parametrize("name", [name for name in DRAFTERS if name != "none"])
def test_rollback_and_a_fresh_prefill_propose_the_same(name):
    """From one to all tokens of the last steps are taken back, differently in each sequence."""
    drafter = build(name)
    first, states = walk(target(), drafter, jnp.asarray(padded(PROMPTS)), LENGTHS)
    texts = [
        [*prompt, *np.asarray(states.tokens[-1, b, : states.num_tokens[-1, b]]).tolist()]
        for b, prompt in enumerate(PROMPTS)
    ]
    tokens = jnp.asarray(padded(texts))
    last = at(states, 2)
    for index, lengths in enumerate([first.lengths, states.lengths[1], last.lengths]):
        # One token further than where a step ended, where there is such a token.
        lengths = jnp.minimum(lengths + jnp.asarray([0, 1]), last.lengths)
        back, new = roll_back(target(), drafter, last, tokens, lengths)
        used = (np.asarray(back.parents) >= 0) & (np.asarray(new.parents) >= 0)
        assert (np.asarray(back.tokens) == np.asarray(new.tokens))[used].all(), index
        if name == "nested":
            # Where inner rounds begin shifts how far the last one reaches, not what the chain says.
            assert (used.sum(1) >= drafter.min_draft_depth).all()
        else:
            assert (back.parents == new.parents).all(), index


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def touched(model, drafter, state):
    """The target's and the drafter's keys and values before and after a step."""

    def caches(state):
        leaves = jax.tree.leaves((state.cache, state.draft))
        return [leaf for leaf in leaves if leaf.ndim == 4 and leaf.shape[2] == CAPACITY]

    after = decoding.step(model, drafter, state, NO_STOP, GREEDY, verify.Greedy())
    return caches(state), caches(after)


@pytest.mark.parametrize("name", ["self", "eagle", "hierarchical", "lm"])
def test_steps_write_only_within_the_scratch_that_they_declare(name):
    drafter = build(name)
    _, states = walk(target(), drafter, jnp.asarray(padded(PROMPTS)), LENGTHS)
    state = at(states, 1)
    for before, after in zip(*touched(target(), drafter, state), strict=True):
        for b, length in enumerate(state.lengths.tolist()):
            slots = np.flatnonzero(np.asarray(before != after)[b].any(axis=(0, 2)))
            assert (slots < length + drafter.scratch).all(), (slots, length)


def test_every_kind_of_the_registry_is_tested_here():
    assert set(registry.kinds()) <= set(DRAFTERS)
