"""The training-time test is drafting: what is trained is what `propose` computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.decoding import target as passes
from specjax.models import cache as kv
from specjax.models import layers
from specjax.training import initial, losses, vocabulary
from specjax.training.batches import Batch
from tests import tiny

WIDTH = 9


def _batch(target, needs="final", seed=0) -> Batch:
    tokens = jax.random.randint(jax.random.key(seed), (2, WIDTH), 0, target.config.vocab_size)
    cache = kv.init(target.config, 2, WIDTH, jnp.float32)
    start = jnp.zeros(2, jnp.int32)
    run = jax.jit(passes.forward_chunk, static_argnames="needs")
    out, features = run(target, tokens, start, cache, needs)
    greedy = jnp.argmax(target.logits(out.hidden), -1).astype(jnp.int32)
    counts = jnp.arange(WIDTH) < jnp.asarray([[WIDTH - 1], [WIDTH - 3]])
    return Batch(tokens=tokens, inputs=features, final=out.hidden, greedy=greedy, counts=counts)


def _jitted(loss):
    return jax.jit(loss, static_argnames="weights")


@jax.jit
def _draft(head, hidden, tokens, start, cache, target):
    return head(hidden, layers.causal_block(tokens, start), cache, target)


def _heads():
    target = tiny.model(tiny.config(num_layers=7, intermediate_size=32))
    ids = jnp.asarray([0, 2, 3, 5, 7, 8, 9, 12])
    yield target, initial.eagle_head(target, jax.random.key(3))
    yield target, initial.eagle3_head(target, jax.random.key(3), ids)


@pytest.mark.parametrize(
    "kind", [pytest.param(0, marks=pytest.mark.slow, id="eagle"), pytest.param(1, id="eagle3")]
)
def test_every_step_equals_drafting(kind):
    """Row t of step s: true pairs up to t - s, then one drafted token after the other."""
    target, head = list(_heads())[kind]
    batch, steps = _batch(target, head.needs), 3
    found = jax.jit(lambda *parts: list(losses.drafted(*parts, steps)))(head, target, batch)
    following = np.roll(np.asarray(batch.tokens), -1, axis=1)
    following[:, -1] = 0
    for last_true in (0, 4):
        cache = kv.init(head.config, 2, WIDTH, jnp.float32, num_layers=1)
        hidden = head.fuse(batch.inputs[:, : last_true + 1])
        start = jnp.zeros(2, jnp.int32)
        for step in range(steps):
            row = last_true + step
            tokens = jnp.asarray(following[:, row - hidden.shape[1] + 1 : row + 1])
            out, cache = _draft(head, hidden, tokens, start, cache, target)
            np.testing.assert_allclose(found[step][:, row], out[:, -1], rtol=0, atol=2e-5)
            hidden, start = out[:, -1:], jnp.full((2,), row + 1, jnp.int32)


@pytest.mark.slow
def test_a_perfect_head_has_no_loss():
    """Regression vanishes where the output is the target's next feature, cross-entropy is then the entropy."""
    target = tiny.model()
    batch = _batch(target)
    vocab = vocabulary.of_target(target, np.arange(target.config.vocab_size))

    class Oracle:
        config = tiny.config(num_layers=1)
        dtype = jnp.float32

        def fuse(self, features):
            return features

        def __call__(self, hidden, block, cache, target):
            return jnp.roll(batch.final, -1, axis=1), cache

    weights = losses.Weights(steps=1, regression=1.0, cross_entropy=0.0, decay=1.0)
    loss, measured = losses.unrolled(Oracle(), target, vocab, batch, weights)
    assert float(loss) == 0
    assert int(measured["agreed"][0]) == int(measured["counted"][0]) == 7 + 5
    logits = np.asarray(target.logits(batch.final[0, 1:8]), np.float64)
    logits = np.concatenate([logits, np.asarray(target.logits(batch.final[1, 1:6]), np.float64)])
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    entropy = -np.sum(probabilities * np.log(probabilities))
    np.testing.assert_allclose(measured["cross_entropy"][0], entropy, rtol=1e-5)


def test_tokens_outside_the_draft_vocabulary_do_not_count():
    target, head = next(iter(_heads()))
    batch = _batch(target)
    ids = np.asarray([1, 4, 6])
    vocab = vocabulary.of_target(target, ids)
    weights = losses.Weights(steps=2, regression=0.0, cross_entropy=1.0, decay=0.5)
    _, measured = _jitted(losses.unrolled)(head, target, vocab, batch, weights)
    following = np.asarray(batch.greedy)[:, 1:]
    inside = np.isin(following, ids) & np.asarray(batch.counts)[:, 1:]
    assert int(measured["known"][0]) == inside.sum()
    assert int(measured["known"][1]) == inside[:, 1:].sum()
    assert int(measured["agreed"][0]) <= inside.sum()


def test_gradients_through_the_output_head():
    """They are written by hand, so that bfloat16 models multiply in bfloat16 both ways."""
    target = tiny.model()
    vocab = vocabulary.of_target(target, np.asarray([1, 4, 6]))
    features, factors = jax.random.normal(jax.random.key(1), (2, 2, 3, vocab.output.shape[1]))
    weights = factors[..., :3]
    found = jax.grad(lambda x: jnp.sum(weights * jnp.sin(vocabulary.logits(vocab, x))))(features)
    wanted = jax.grad(lambda x: jnp.sum(weights * jnp.sin(x @ vocab.output.T)))(features)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_medusa_heads_see_further_tokens():
    """Head i is measured against the token i + 2 after its feature; padding and the end never count."""
    target = tiny.model()
    heads = initial.medusa_heads(target, 3)
    batch = _batch(target)
    vocab = vocabulary.of_target(target, np.arange(target.config.vocab_size))
    weights = losses.Weights(steps=1, regression=0.0, cross_entropy=1.0, decay=1.0)
    _, measured = _jitted(losses.medusa)(heads, target, vocab, batch, weights)
    np.testing.assert_array_equal(measured["counted"], [7 + 5, 6 + 4, 5 + 3])
    logits = jax.nn.log_softmax(
        target.logits(batch.final)
    )  # untrained heads repeat the target's prediction
    tokens = np.asarray(batch.tokens)
    for i in range(3):
        expected = -sum(
            float(logits[b, t, tokens[b, t + 2 + i]])
            for b, end in ((0, WIDTH - 1), (1, WIDTH - 3))
            for t in range(end - i - 1)
        )
        np.testing.assert_allclose(measured["cross_entropy"][i], expected, rtol=1e-5)
