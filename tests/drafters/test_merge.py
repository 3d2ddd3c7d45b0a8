"""Unions of trees, and the drafter that makes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specjax.decoding import tree as trees
from specjax.decoding import union as unions
from specjax.drafters import merge, registry
from specjax.drafters.lm import LM
from specjax.drafters.ngram import Ngram
from specjax.errors import ConfigError
from tests import tiny

NODES, DEPTH = 6, 4


@functools.partial(jax.jit, static_argnames="budget")
def union(made, chances, budget):
    return unions.union(made, chances, budget, DEPTH)


@st.composite
def drafts(draw):
    """A tree of NODES nodes, some of them unused, with chances that do not rise along paths."""
    tokens, parents, chances = [9], [-1], [1.0]
    for node in range(1, NODES):
        parent = draw(st.integers(-1, node - 1))
        unused = parent > 0 and parents[parent] < 0
        deep = not unused and len(path(parents, parent)) > DEPTH - 1
        parents.append(-1 if unused or deep else parent)
        tokens.append(draw(st.integers(0, 2)))
        chances.append(chances[max(parent, 0)] * draw(st.sampled_from([0.25, 0.5, 0.75, 1.0])))
    return tokens, parents, chances


def path(parents: list[int], node: int) -> list[int]:
    found = []
    while node > 0:
        found.append(node)
        node = parents[node]
    return found[::-1]


def by_path(tokens, parents, chances, combine) -> dict[tuple[int, ...], float]:
    found = {}
    for node in range(1, len(tokens)):
        if parents[node] >= 0:
            key = tuple(tokens[n] for n in path(parents, node))
            old = found.get(key, 0.0)
            found[key] = max(old, chances[node]) if combine == "max" else old + chances[node]
    return found


@settings(deadline=None, max_examples=100)
@given(drawn=st.lists(drafts(), min_size=2, max_size=2), budget=st.sampled_from([2, 4, 12]))
def test_a_union_holds_the_best_paths_once(drawn, budget):
    made = [
        trees.Tree(
            tokens=jnp.asarray([tokens], jnp.int32),
            parents=jnp.asarray([parents], jnp.int32),
            max_depth=DEPTH,
        )
        for tokens, parents, _ in drawn
    ]
    chances = [jnp.asarray([chances], jnp.float32) for *_, chances in drawn]
    expected: dict[tuple[int, ...], float] = {}
    for tokens, parents, own in drawn:
        for key, value in by_path(tokens, parents, own, "max").items():
            expected[key] = max(expected.get(key, 0.0), value)
    tree, found = union(made, chances, budget)
    assert tree.num_nodes <= budget
    kept = by_path(*(np.asarray(x[0]).tolist() for x in (tree.tokens, tree.parents, found)), "add")
    best = sorted(expected.values(), reverse=True)[: budget - 1]
    assert sorted(kept.values(), reverse=True) == pytest.approx(best)
    assert all(expected[key] == pytest.approx(value) for key, value in kept.items())


def test_drafters_that_follow_only_themselves_are_refused_by_name():
    parts = tiny.Parts(tiny.model())
    with pytest.raises(ConfigError, match="LM knows its own drafts only"):
        merge.merge([Ngram(), LM(model=parts.model)])
    with pytest.raises(ConfigError, match="at least two"):
        merge.merge([Ngram()])
    with pytest.raises(ConfigError, match="normed output"):
        merge.merge([tiny.DRAFTERS["eagle"](parts), tiny.DRAFTERS["head"](parts)])


def test_specs_of_merged_drafters_are_checked_before_loading():
    with pytest.raises(ConfigError, match="expected a list of drafters"):
        registry.parse('{"kind": "merge", "of": "ngram"}')
    with pytest.raises(ConfigError, match="'ngram' has no option 'depth'"):
        registry.parse('{"kind": "merge", "of": [{"kind": "ngram", "depth": 3}]}')
    spec = {"kind": "merge", "of": [{"kind": "ngram"}, {"kind": "self", "scheme": "w4a4"}]}
    assert registry.needs_codes(spec)


def test_a_drafter_that_is_right_more_often_gets_the_nodes():
    """One drafter is always right and the other never: soon the budget is the first one's."""
    first, second = Ngram(draft_depth=3), Ngram(draft_depth=3, ngram_min=1)
    drafter = merge.merge([first, second], num_nodes=4)
    state = drafter.init(None, 1, 32)
    right = trees.chain(jnp.asarray([5]), jnp.asarray([[1, 2, 3]], jnp.int32))
    wrong = trees.chain(jnp.asarray([5]), jnp.asarray([[7, 7, 7]], jnp.int32))
    tried, kept = merge._counts(right, verified([1, 2, 3, 4]), 3)
    assert np.asarray(tried)[0, :, 0].tolist() == [1, 1, 1] == np.asarray(kept)[0, :, 0].tolist()
    tried, kept = merge._counts(wrong, verified([1, 2, 3, 4]), 3)
    assert np.asarray(tried)[0, :, 0].tolist() == [1, 0, 0]
    assert np.asarray(kept).sum() == 0
    assert state.tried.shape == (1, 2, 3, 4)


def verified(tokens: list[int]):
    from specjax.verify.base import Verified

    rows = jnp.asarray([tokens], jnp.int32)
    return Verified(
        path=jnp.zeros_like(rows),
        length=jnp.asarray([len(tokens)], jnp.int32),
        tokens=rows,
        next_token=rows[:, -1],
    )
