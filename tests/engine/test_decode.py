"""The loop's own rules: pieces of it, what a step counts, sequences that idle, slots that are refilled."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import verify
from specjax.decoding import sampling as sample
from specjax.drafters.base import Chunk
from specjax.engine import decode as decoding
from tests import planned, tiny

CONFIG = tiny.config(vocab_size=64, num_layers=1)
PROMPTS = [[11, 5, 40, 2, 63], [7, 7, 21], [30, 1, 2, 3, 4, 5, 6, 8]]
PLAN = (2, 0, 4, 1, 3)
LIMIT, CAPACITY, WIDTH = 12, 40, 8
NO_STOP = (-1, -1)


@functools.cache
def target():
    return tiny.model(CONFIG, seed=2)


@functools.cache
def texts() -> list[list[int]]:
    return tiny.greedy(target(), PROMPTS, LIMIT + 6)


@functools.cache
def drafter():
    return planned.planned(texts(), PLAN, vocab_size=CONFIG.vocab_size)


def new_tokens(row: int) -> list[int]:
    """What plain greedy decoding gives for a prompt."""
    return texts()[row][len(PROMPTS[row]) :]


prefill_chunk = jax.jit(decoding.prefill_chunk)
decode = jax.jit(decoding.decode, static_argnames="acceptor")
insert = jax.jit(decoding.insert)


def begin(rows=(0, 1, 2), limits=(LIMIT, LIMIT, LIMIT), stop_ids=NO_STOP) -> decoding.DecodeState:
    """A prefilled batch."""
    batch = len(rows)
    state = decoding.init_state(target(), drafter(), batch, CAPACITY, LIMIT)
    state = replace(state, limit=jnp.asarray(limits, jnp.int32))
    tokens = np.zeros((batch, WIDTH + 1), np.int32)
    for row, index in zip(tokens, rows, strict=True):
        row[: len(PROMPTS[index])] = PROMPTS[index]
    lengths = jnp.asarray([len(PROMPTS[index]) for index in rows], jnp.int32)
    chunk = Chunk(
        tokens=jnp.asarray(tokens[:, :-1]),
        next_tokens=jnp.asarray(tokens[:, 1:]),
        start=jnp.zeros((batch,), jnp.int32),
        valid=lengths,
        features=None,
    )
    return prefill_chunk(
        target(), drafter(), state, chunk, lengths, jnp.asarray(stop_ids), sample.sampling()
    )


def advance(state, steps: int = 99, stop_ids=NO_STOP) -> decoding.DecodeState:
    return decode(
        target(),
        drafter(),
        state,
        jnp.asarray(stop_ids),
        jnp.int32(steps),
        sample.sampling(),
        acceptor=verify.Greedy(),
    )


def produced(state, row: int) -> list[int]:
    return np.asarray(state.tokens[row, : state.num_tokens[row]]).tolist()


def test_an_idle_batch_runs_no_step():
    state = decoding.init_state(target(), drafter(), 3, CAPACITY, LIMIT)
    after = advance(state)
    assert state.done.all()
    for before, now in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert (before == now).all()


def test_prefill_commits_the_prompt_and_yields_the_first_token():
    state = begin()
    assert state.lengths.tolist() == [len(prompt) for prompt in PROMPTS]
    assert state.num_tokens.tolist() == [1, 1, 1]
    assert state.root.tolist() == [new_tokens(row)[0] for row in range(3)]
    assert not state.done.any()
    assert not state.num_spec_steps.any()


def test_steps_in_pieces_are_steps_at_once():
    whole, pieces = advance(begin()), begin()
    for steps in (1, 2, 1, 99):
        pieces = advance(pieces, steps)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        assert (one == other).all()


def test_each_step_adds_what_it_accepted_and_the_bonus_token():
    state, expected = begin(), 1
    for step in range(3):
        state = advance(state, 1)
        expected += PLAN[step] + 1
        assert state.num_tokens.tolist() == [expected] * 3
        assert state.num_spec_steps.tolist() == [step + 1] * 3
        assert state.lengths.tolist() == [len(p) + expected - 1 for p in PROMPTS]
        for row in range(3):
            assert produced(state, row) == new_tokens(row)[:expected]
            assert state.root[row] == new_tokens(row)[expected - 1]
    assert state.acceptance_histogram.tolist() == [[1, 0, 1, 0, 1]] * 3
    assert state.num_draft_tokens.tolist() == [3 * 4] * 3


def test_limits_cut_the_last_step_but_not_its_acceptance():
    """Steps end after 4, 5, 10, 12, 16 tokens."""
    state = advance(begin(limits=(12, 7, 4)))
    assert state.num_tokens.tolist() == [12, 7, 4]
    assert state.num_spec_steps.tolist() == [4, 3, 1]
    assert state.acceptance_histogram.tolist() == [
        [1, 1, 1, 0, 1],
        [1, 0, 1, 0, 1],
        [0, 0, 1, 0, 0],
    ]
    assert not state.stopped.any()
    for row, count in enumerate((12, 7, 4)):
        assert produced(state, row) == new_tokens(row)[:count]


def test_nothing_follows_the_first_stop_token():
    """The stop token comes in the middle of the third step, which accepts four drafts."""
    tokens = new_tokens(0)
    stop = next(tokens[i] for i in (6, 7, 8) if tokens[i] not in tokens[:i])
    outputs = [new_tokens(row)[:LIMIT] for row in range(3)]
    at = [output.index(stop) if stop in output else None for output in outputs]
    state = advance(begin(stop_ids=(stop, -1)), stop_ids=(stop, -1))
    for row, index in enumerate(at):
        count = LIMIT if index is None else index + 1
        assert produced(state, row) == new_tokens(row)[:count]
        assert bool(state.stopped[row]) == (index is not None)
    assert state.done.all()


def test_a_stop_token_beyond_the_limit_does_not_count_as_stopping():
    """The limit cuts the accepted path right before the stop token."""
    tokens = new_tokens(0)
    first = next(i for i in range(4, LIMIT) if tokens[i] not in tokens[:i])
    stop = (tokens[first], -1)
    state = advance(begin(limits=(first, LIMIT, LIMIT), stop_ids=stop), stop_ids=stop)
    assert produced(state, 0) == tokens[:first]
    assert not state.stopped[0]


def test_finished_sequences_idle_while_others_go_on():
    state = advance(begin(limits=(2, LIMIT, LIMIT)), 1)
    assert state.done.tolist() == [True, False, False]
    after = advance(state)
    for name in ("lengths", "root", "num_tokens", "num_spec_steps", "num_draft_tokens"):
        assert getattr(after, name)[0] == getattr(state, name)[0], name
    assert (after.tokens[0, :2] == state.tokens[0, :2]).all()
    assert (after.acceptance_histogram[0] == state.acceptance_histogram[0]).all()
    length = int(state.lengths[0])
    for old, new in zip(state.cache.keys, after.cache.keys, strict=True):
        assert (old[0, :, :length] == new[0, :, :length]).all()


@pytest.mark.parametrize("slot", [0, 2])
def test_insert_refills_a_slot_and_leaves_the_others(slot):
    """The new request continues as if it had been there from the start; so do its neighbours."""
    running = advance(begin(), 2)
    single = begin(rows=(1,), limits=(9,))
    state = insert(running, jnp.int32(slot), single)
    state = advance(state)
    for row in range(3):
        expected = new_tokens(1)[:9] if row == slot else new_tokens(row)[:LIMIT]
        assert produced(state, row) == expected
    assert state.num_spec_steps[slot] == 3


def test_the_loop_ends_when_all_are_done_whatever_the_maximum():
    state = advance(begin(limits=(3, 1, 2)), steps=1000)
    assert state.done.all()
    assert state.num_spec_steps.tolist() == [1, 0, 1]
