"""The lossy acceptance rules: their formulas, and that what they produce is labelled."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from experiments import generate
from specjax import verify
from specjax.decoding import sampling as sample
from specjax.decoding import tree as trees
from specjax.decoding.tree import Tree
from specjax.errors import ConfigError
from tests import paths, strategies, tiny
from tests.oracle import softmax
from tests.strategies import SETTINGS

VOCAB = 5
SAMPLED = sample.sampling(0.7)


@jax.jit
def typical(tree: Tree, logits, keys):
    return verify.Typical()(tree, None, logits, keys, SAMPLED)


def upstream(tokens, parents, logits, temperature: float) -> set[tuple[int, ...]]:
    """Longest paths whose tokens all pass the threshold, the likeliest of them; one node at a time."""
    probs = softmax(np.asarray(logits, np.float64) / temperature)
    entropy = -(probs * np.log(probs + 1e-5)).sum(-1)
    threshold = np.minimum(0.09, 0.3 * np.exp(-entropy))
    lines = {0: ((0,), 0.0)}
    for node in range(1, len(tokens)):
        parent = parents[node]
        if parent in lines and probs[parent, tokens[node]] > threshold[parent]:
            path, score = lines[parent]
            lines[node] = ((*path, node), score + np.log(probs[parent, tokens[node]]))
    longest = max(len(path) for path, _ in lines.values())
    best = max(score for path, score in lines.values() if len(path) == longest)
    return {path for path, score in lines.values() if len(path) == longest and score > best - 1e-5}


@SETTINGS
@hypothesis.given(strategies.forests(), strategies.seeds())
def test_typical_is_upstreams_rule(parents, seed):
    rng = np.random.default_rng(seed)
    batch, count = parents.shape
    tokens = rng.integers(0, VOCAB, (batch, count)).astype(np.int32)
    logits = (3 * rng.standard_normal((batch, count, VOCAB))).astype(np.float32)
    tree = Tree(tokens=jnp.asarray(tokens), parents=jnp.asarray(parents), max_depth=count - 1)
    keys = sample.request_keys(seed, np.arange(batch))
    found = jax.tree.map(np.asarray, typical(tree, jnp.asarray(logits), keys))
    for b in range(batch):
        expected = upstream(tokens[b], parents[b], logits[b], 0.7)
        path = tuple(found.path[b, : found.length[b]].tolist())
        assert path in expected
        assert found.tokens[b, : found.length[b] - 1].tolist() == [
            int(tokens[b, n]) for n in path[1:]
        ]


DRAWS = 20_000


@functools.cache
def relaxed_draws():
    """A chain of two fixed drafts, judged many times: lengths, next tokens, and the distributions."""
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((1, 3, VOCAB)).astype(np.float32)
    q = softmax(1.6 * logits).astype(np.float32)[:, [0, 0, 1]]
    drafts = q[0, 1:].argmax(-1)
    root = jnp.zeros((DRAWS,), jnp.int32)
    tree = trees.chain(root, jnp.broadcast_to(jnp.asarray(drafts, jnp.int32), (DRAWS, 2)))

    def repeated(rows):
        return jnp.broadcast_to(jnp.asarray(rows), (DRAWS, *rows.shape[1:]))

    rule = jax.jit(verify.Relaxed())
    keys = sample.request_keys(0, np.arange(DRAWS))
    found = rule(tree, repeated(q), repeated(logits), keys, sample.sampling())
    return np.asarray(found.length), np.asarray(found.next_token), softmax(logits[0]), q[0], drafts


def test_relaxed_accepts_with_the_ratio_of_probabilities():
    length, _, p, q, drafts = relaxed_draws()
    reached = length >= 1
    for step, draft in enumerate(drafts):
        expected = min(1.0, p[step, draft] / q[step + 1, draft])
        accepted = length > step + 1
        rate = accepted[reached].mean()
        assert 0.05 < expected < 0.95, "the setting shows nothing"
        assert abs(rate - expected) < 4 * np.sqrt(expected * (1 - expected) / reached.sum())
        reached = accepted


def test_relaxed_resamples_after_rejections_and_is_greedy_at_the_end():
    length, next_token, p, q, _ = relaxed_draws()
    rejected = next_token[length == 1]
    residual = np.maximum(p[0] - q[1], 0)
    residual /= residual.sum()
    counts = np.bincount(rejected, minlength=VOCAB) / len(rejected)
    assert np.abs(counts - residual).max() < 4 * np.sqrt(0.25 / len(rejected))
    assert (counts > 0).sum() > 1, "a greedy rule emits one token only"
    assert (next_token[length == 3] == p[2].argmax()).all()


@functools.cache
def model():
    return specjax.load(paths.fixture("tiny-gptq-g128"), dtype="float32", dequantize="never")


SELF = {"kind": "self", "scheme": "w4a8"}


@pytest.mark.parametrize(
    ("options", "is_lossless"),
    [
        pytest.param({}, True, marks=pytest.mark.slow),
        pytest.param({"temperature": 0.8}, True, marks=pytest.mark.slow),
        ({"acceptance": "relaxed"}, False),
        pytest.param(
            {"acceptance": verify.Typical(epsilon=0.2), "temperature": 0.8},
            False,
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_results_say_whether_they_are_the_targets(options, is_lossless):
    with tiny.hurried_compiler():
        [result] = model().generate(tiny.prompts()[0], SELF, max_new_tokens=12, **options)
    assert result.metrics.lossless is is_lossless
    assert result.to_dict()["lossless"] is is_lossless
    assert ("lossy" in generate.summary(result)) is not is_lossless
    assert len(result.output_ids) == 12


def test_relaxed_needs_distributions():
    with pytest.raises(ConfigError, match="use the drafter 'self' or 'lm'"):
        model().generate(tiny.prompts()[0], "ngram", acceptance="relaxed", max_new_tokens=4)
