"""Distributions with their filters, draws, and random keys."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from specjax.decoding import filters
from specjax.decoding import sampling as sample
from specjax.errors import ConfigError
from tests import distributions, strategies
from tests.strategies import SETTINGS

VOCAB = 12
probabilities = jax.jit(sample.probabilities)


@SETTINGS
@hypothesis.given(
    strategies.logits(VOCAB),
    st.sampled_from([0.1, 0.7, 1.0, 2.5]),
    st.sampled_from([0, 1, 2, 5, VOCAB, VOCAB + 3]),
    st.sampled_from([0.05, 0.5, 0.9, 1.0]),
)
def test_probabilities_are_the_numpy_formulation(logits, temperature, top_k, top_p):
    expected = distributions.probabilities(logits, temperature, top_k, top_p)
    if top_p < 1:
        # On the edge of the top-p set float32 may decide otherwise than float64.
        mass = np.cumsum(np.sort(distributions.probabilities(logits, temperature, top_k))[::-1])
        hypothesis.assume(np.abs(mass - top_p).min() > 1e-5)
    settings = sample.sampling(temperature, top_k, top_p)
    found = np.asarray(probabilities(jnp.asarray(logits), settings))
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-5
    assert ((found == 0) == (expected < 1e-37)).all()


def test_probabilities_work_on_any_leading_shape():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, VOCAB)), jnp.float32)
    settings = sample.sampling(0.8, 4, 0.9)
    found = probabilities(logits, settings)
    for index in np.ndindex(2, 3):
        assert np.allclose(found[index], probabilities(logits[index], settings), atol=1e-7)


@SETTINGS
@hypothesis.given(
    hnp.arrays(
        np.float32, 40, elements=st.floats(-float(2**99), 2.0**99, width=32, allow_subnormal=False)
    ),
    st.integers(1, 40),
)
def test_top_k_keeps_what_ties_with_the_kth_best(values, top_k):
    found = filters.kept(jnp.asarray(values), jnp.int32(top_k), jnp.float32(1))
    assert np.array_equal(found, values >= np.sort(values)[-top_k])


def test_filters_of_extreme_values():
    values = jnp.asarray([-0.0, 0.0, -jnp.inf, -1e-30, 3e38, -3e38], jnp.float32)
    kept = [filters.kept(values, jnp.int32(k), jnp.float32(1)) for k in (1, 2, 4, 6)]
    assert [int(mask.sum()) for mask in kept] == [1, 3, 4, 6]
    assert kept[1][:2].all(), "both zeros tie"
    # Mass that rounding leaves short of top_p keeps everything; the most likely token is always kept.
    short = jnp.log(jnp.full(30, 1 / 30, jnp.float32) * (1 - 1e-6))
    assert filters.kept(short, jnp.int32(99), jnp.float32(1 - 6e-8)).all()
    assert filters.kept(values[:3], jnp.int32(99), jnp.float32(1e-30)).sum() == 2


def test_values_are_traced_so_that_changing_them_compiles_nothing():
    traces = []

    @jax.jit
    def run(logits, settings):
        traces.append(1)
        return sample.probabilities(logits, settings)

    logits = jnp.zeros((VOCAB,))
    for temperature, top_k, top_p in [(1.0, 3, 1.0), (0.3, 5, 0.5), (2.0, 0, 0.9)]:
        run(logits, sample.sampling(temperature, top_k, top_p))
    assert len(traces) == 1


@pytest.mark.parametrize("filters", [{}, {"top_k": 4, "top_p": 0.8}])
def test_draws_have_the_frequencies_of_the_distribution(filters):
    logits = np.random.default_rng(1).standard_normal(VOCAB).astype(np.float32) * 1.5
    settings = sample.sampling(0.9, **filters)
    keys = sample.request_keys(3, np.arange(20_000))
    rows = jnp.broadcast_to(jnp.asarray(logits), (20_000, VOCAB))
    tokens = np.asarray(jax.jit(sample.choose)(keys, rows, settings))
    expected = distributions.probabilities(logits, 0.9, **filters)
    counts = np.bincount(tokens, minlength=VOCAB)
    assert distributions.p_value(counts, expected) > distributions.SIGNIFICANCE
    flat = np.full(VOCAB, 1 / VOCAB)
    assert distributions.p_value(counts, flat) < distributions.SIGNIFICANCE


def test_greedy_takes_the_first_of_the_likeliest_whatever_the_key():
    logits = jnp.asarray([[0.0, 2.0, 2.0], [5.0, 1.0, 1.0]])
    tokens = sample.choose(sample.request_keys(0, [0, 1]), logits, sample.sampling(0.0))
    assert tokens.tolist() == [1, 0]


@SETTINGS
@hypothesis.given(
    st.sampled_from([1, 7, VOCAB, 1536]).flatmap(
        lambda size: hnp.arrays(
            np.float32, (2, 3, size), elements=st.sampled_from([-np.inf, -1.0, 0.0, 0.5])
        )
    )
)
def test_most_likely_is_numpys_argmax_ties_included(logits):
    found = jax.jit(sample.most_likely)(logits)
    np.testing.assert_array_equal(found, logits.argmax(-1))


def test_request_keys_do_not_depend_on_slot_or_order():
    together = np.asarray(sample.request_keys(5, [3, 1, 2]))
    for row, request in zip(together, [3, 1, 2], strict=True):
        assert (np.asarray(sample.request_keys(5, [request]))[0] == row).all()
    assert len({tuple(row) for row in together.tolist()}) == 3
    assert (np.asarray(sample.request_keys(6, [3, 1, 2])) != together).any(axis=1).all()


def test_fold_gives_every_sequence_a_key_of_its_own():
    keys = sample.request_keys(0, [0, 1])
    folded = np.asarray(sample.fold(keys, jnp.asarray([7, 9])))
    assert (np.asarray(sample.fold(keys, 7))[0] == folded[0]).all()
    assert (np.asarray(sample.fold(keys[1:], jnp.asarray([9])))[0] == folded[1]).all()
    assert (np.asarray(sample.fold(keys, 8)) != np.asarray(sample.fold(keys, 7))).any(axis=1).all()


def test_log_top_k_is_sorted_and_normalised():
    logits = np.random.default_rng(2).standard_normal((3, VOCAB)).astype(np.float32)
    logits[0, 4] = logits[0, 9] = logits[0].max() + 1
    values, tokens = sample.log_top_k(jnp.asarray(logits), 4)
    expected = np.log(np.stack([distributions.probabilities(row) for row in logits]))
    for row in range(3):
        order = np.argsort(-logits[row], kind="stable")[:4]
        assert np.asarray(tokens[row]).tolist() == order.tolist()
        assert np.allclose(values[row], expected[row, order], atol=1e-5)
    assert np.asarray(tokens[0, :2]).tolist() == [4, 9]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1.0, "top_k": -1}, "top_k=-1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_values_out_of_range_are_refused_by_name(settings, name):
    with pytest.raises(ConfigError, match=name):
        sample.sampling(**settings)


def test_filters_are_static_and_only_on_where_they_do_something():
    assert sample.sampling().greedy
    assert not sample.sampling(top_k=3).filtered
    assert not sample.sampling(1.0).filtered
    assert sample.sampling(1.0, top_k=3).filtered
    assert sample.sampling(1.0, top_p=0.9).filtered


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.9}, {"top_k": 2**70}])
def test_tiny_temperatures_are_greedy_and_huge_ones_flat(settings):
    logits = np.random.default_rng(0).standard_normal((3, VOCAB)).astype(np.float32) * 30
    for temperature in (1e-7, 1e-9, 1e-10, 1e-30, 1e-38, 1e-45, 5e-324):
        found = probabilities(jnp.asarray(logits), sample.sampling(temperature, **settings))
        np.testing.assert_array_equal(found, np.eye(VOCAB)[logits.argmax(-1)], str(temperature))
    kept = settings.get("top_k", VOCAB)
    for temperature in (1e20, 1e38, 1e300):
        found = probabilities(jnp.asarray(logits), sample.sampling(temperature, **settings))
        expected = np.sort(np.where(np.arange(VOCAB) < min(kept, VOCAB), 1 / min(kept, VOCAB), 0))
        if "top_p" not in settings:
            np.testing.assert_allclose(np.sort(found, -1), np.tile(expected, (3, 1)), atol=1e-6)


@pytest.mark.parametrize("top_p", [1e-30, 1e-40, 5e-324])
def test_the_smallest_top_p_keeps_the_most_likely_token(top_p):
    logits = jnp.asarray(np.random.default_rng(1).standard_normal(VOCAB), jnp.float32)
    found = probabilities(logits, sample.sampling(1.0, top_p=top_p))
    np.testing.assert_array_equal(found, np.eye(VOCAB)[int(logits.argmax())])


def test_every_seed_has_a_stream_of_its_own():
    seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**64 + 1, 10**30]
    seeds += [-1, -2, -(2**31), -(2**32), -(2**63), -(2**64) - 1]
    keys = {tuple(np.asarray(sample.request_keys(seed, [0]))[0].tolist()) for seed in seeds}
    assert len(keys) == len(seeds)
    for seed in (0, 1, 12345, 2**31 - 1):
        usual = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 4))
        assert (np.asarray(sample.request_keys(seed, [4]))[0] == np.asarray(usual)).all()


@pytest.mark.parametrize("value", ["1", None, True, 1 + 2j])
@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p"])
def test_what_is_no_number_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"{name}="):
        sample.sampling(**{name: value})
