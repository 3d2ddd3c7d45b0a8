"""Self-speculation: verification overwrites what the draft wrote; every chain length works; dense targets refused."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax import verify
from specjax.decoding import sampling as sample
from specjax.decoding import target as passes
from specjax.drafters.base import Chunk
from specjax.drafters.self_draft import SelfDraft
from specjax.engine import decode as decoding
from specjax.errors import ConfigError
from specjax.models import cache as kv
from tests import paths, tiny

STEPS, WIDTH, CAPACITY = 4, 32, 64
NO_STOP = jnp.asarray([-1], jnp.int32)


@jax.jit
def decoded(target, drafter, tokens, lengths):
    """States after the prompts and after each of some steps."""
    batch = tokens.shape[0]
    state = decoding.init_state(target, drafter, batch, CAPACITY, 32)
    state = replace(state, limit=jnp.full((batch,), 32, jnp.int32))
    chunk = Chunk(
        tokens=tokens[:, :-1],
        next_tokens=tokens[:, 1:],
        start=jnp.zeros((batch,), jnp.int32),
        valid=lengths,
        features=None,
    )
    greedy = sample.sampling()
    state = decoding.prefill_chunk(target, drafter, state, chunk, lengths, NO_STOP, greedy)
    states = [state]
    for _ in range(STEPS):
        states.append(decoding.step(target, drafter, states[-1], NO_STOP, greedy, verify.Greedy()))
    return states


@jax.jit
def fresh(target, tokens):
    cache = kv.init(target.config, tokens.shape[0], CAPACITY, jnp.float32)
    start = jnp.zeros((tokens.shape[0],), jnp.int32)
    return passes.forward_chunk(target, tokens, start, cache, None)[0].cache


def largest_difference(state, text_of, target, tokens) -> float:
    """Between the cache's committed rows and those of one pass over the text."""
    found, expected = jax.tree.leaves(state.cache), jax.tree.leaves(fresh(target, tokens))
    return max(
        float(np.abs(np.asarray(mine - other)[b, :, : state.lengths[b]]).max())
        for mine, other in zip(found, expected, strict=True)
        for b in range(len(text_of))
    )


def test_committed_rows_are_the_targets_own():
    """After every step the cache is that of the target alone; the draft's own rows would differ visibly."""
    target = tiny.fixture_model("tiny-gptq-g128", "never")
    prompts = tiny.prompts()[:2]
    lengths = jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)
    tokens = np.zeros((2, WIDTH), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    drafter = SelfDraft(draft_depth=3, scheme="w4a8")
    with tiny.hurried_compiler():
        states = decoded(target, drafter, jnp.asarray(tokens), lengths)
        accepted = 0
        for state in states:
            text = np.zeros((2, 48), np.int32)
            for b, prompt in enumerate(prompts):
                full = [*prompt, *np.asarray(state.tokens)[b, : state.num_tokens[b]].tolist()]
                text[b, : len(full)] = full
            committed = jnp.asarray(text)
            assert largest_difference(state, prompts, target, committed) < 1e-4
            accepted = int(np.asarray(state.acceptance_histogram)[:, 1:].sum())
        drafted = largest_difference(states[-1], prompts, target.with_scheme("w4a8"), committed)
    assert accepted, "nothing was accepted, so nothing was kept that the draft had written"
    assert drafted > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2, 5, 8])
def test_every_chain_length_gives_the_targets_output(depth):
    model = specjax.load(paths.fixture("tiny-gptq-g128"), dtype="float32", dequantize="never")
    prompts = tiny.prompts()[:2]
    spec = {"kind": "self", "scheme": "w4a8", "draft_depth": depth}
    plain, found = (
        model.generate(prompts, drafter, max_new_tokens=20, batch_size=2)
        for drafter in ("none", spec)
    )
    assert [r.output_ids for r in found] == [r.output_ids for r in plain]


def test_dense_targets_are_refused_with_a_remedy():
    model = specjax.load(paths.fixture("tiny-fp16"), dtype="float32")
    with pytest.raises(ConfigError, match=r"experiments\.convert --scheme=w4a8"):
        model.drafter({"kind": "self", "scheme": "w4a8"})
