"""Suffix lookup against a search in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from specjax.decoding import tree as trees
from specjax.drafters.ngram import NgramState
from specjax.drafters.suffix import Suffix

DRAFTER = Suffix(
    texts=jnp.asarray([1, 2, 3, 1, 2, 0, -1, 2, 2, 3, -1], jnp.int32),
    draft_depth=4,
    num_tree_nodes=9,
    longest=6,
    shortest=2,
    num_matches=3,
)
CAPACITY = 24


@jax.jit
def propose(drafter, state, root, lengths):
    return drafter.propose(None, None, state, root, lengths, None, None)


def matches(text: list[int], other: bool) -> list[tuple[int, int, list[int]]]:
    """(length, place, continuation) of all matches in the texts of a drafter, or in the text itself."""
    where = np.asarray(DRAFTER.texts).tolist() if other else text
    found = []
    for end in range(1, len(where) + (1 if other else 0)):
        length = 0
        while length < DRAFTER.longest and length < min(end, len(text)):
            if where[end - 1 - length] != text[-1 - length]:
                break
            length += 1
        if length >= DRAFTER.shortest:
            more = where[end : end + DRAFTER.draft_depth]
            found.append((length, end, more[: more.index(-1)] if -1 in more else more))
    return sorted(found, key=lambda match: match[:2], reverse=True)[: DRAFTER.num_matches]


def paths(tree: trees.Tree) -> set[tuple[int, ...]]:
    found = {0: ()}
    for node in range(1, tree.num_nodes):
        parent = int(tree.parents[0, node])
        if parent >= 0:
            found[node] = (*found[parent], int(tree.tokens[0, node]))
    assert len(set(found.values())) == len(found), "a path occurs once"
    return set(found.values())


@settings(deadline=None, max_examples=60)
@given(text=st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_trees_are_the_continuations_of_the_longest_matches(text):
    history = np.full((1, CAPACITY), 3, np.int32)
    history[0, : len(text)] = text
    arguments = jnp.asarray(text[-1:], jnp.int32), jnp.asarray([len(text) - 1], jnp.int32)
    state = NgramState(history=jnp.asarray(history))
    made = propose(DRAFTER, state, *arguments)
    found = paths(made.tree)
    possible = {()}
    for _, _, more in matches(text, False) + matches(text, True):
        possible |= {tuple(more[: n + 1]) for n in range(len(more))}
    assert found <= possible
    assert len(found) == min(len(possible), DRAFTER.num_nodes)
    chances = np.asarray(made.chances[0])
    for node in range(1, made.tree.num_nodes):
        parent = int(made.tree.parents[0, node])
        assert parent < 0 or 0 < chances[node] <= chances[parent]
