"""Trees: what is derived from parents, against slow Python; the dynamic choice of nodes."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from specjax.decoding import tree as trees
from specjax.decoding.tree import Candidates, Tree
from tests import strategies
from tests.strategies import SETTINGS


def make(parents: np.ndarray, max_depth: int | None = None, is_chain: bool = False) -> Tree:
    """A tree with the node numbers as tokens."""
    batch, count = parents.shape
    return Tree(
        tokens=jnp.broadcast_to(jnp.arange(count), (batch, count)),
        parents=jnp.asarray(parents),
        max_depth=count - 1 if max_depth is None else max_depth,
        is_chain=is_chain,
    )


def ancestors(parents: np.ndarray, node: int) -> list[int]:
    """The node and its ancestors, deepest first, one step at a time."""
    line = [node]
    while parents[line[-1]] >= 0:
        line.append(int(parents[line[-1]]))
    return line


mask_of = jax.jit(trees.ancestor_mask)
depths_of = jax.jit(trees.depths)
path_of = jax.jit(trees.path_to, static_argnames="max_depth")


@SETTINGS
@hypothesis.given(strategies.forests())
def test_mask_is_the_transitive_closure_and_depth_its_size(parents):
    tree = make(parents)
    mask = np.asarray(mask_of(tree))
    depth = np.asarray(depths_of(mask))
    for b, row in enumerate(parents):
        for node in range(len(row)):
            line = ancestors(row, node)
            assert set(np.flatnonzero(mask[b, node])) == set(line)
            assert depth[b, node] == len(line) - 1


@SETTINGS
@hypothesis.given(strategies.forests(), st.data())
def test_path_to_lists_the_nodes_from_the_root(parents, data):
    tree = make(parents)
    used = (parents >= 0) | (np.arange(parents.shape[1]) == 0)
    nodes = [data.draw(st.sampled_from(list(np.flatnonzero(row)))) for row in used]
    path = np.asarray(path_of(mask_of(tree), jnp.asarray(nodes, jnp.int32), tree.max_depth))
    assert path.shape == (len(parents), tree.max_depth + 1)
    for row, node, found in zip(parents, nodes, path, strict=True):
        line = ancestors(row, node)[::-1]
        assert found[: len(line)].tolist() == line
        assert not found[len(line) :].any()


@SETTINGS
@hypothesis.given(strategies.forests())
def test_unused_nodes_are_counted_out_and_see_only_themselves(parents):
    tree = make(parents)
    used = np.asarray(trees.used(tree))
    mask = np.asarray(mask_of(tree))
    assert used[:, 0].all()
    assert (used[:, 1:] == (parents[:, 1:] >= 0)).all()
    assert np.asarray(trees.num_draft_tokens(tree)).tolist() == (used.sum(1) - 1).tolist()
    for b, n in zip(*np.nonzero(~used), strict=True):
        assert np.flatnonzero(mask[b, n]).tolist() == [n]
        assert np.flatnonzero(mask[b, :, n]).tolist() == [n]


@pytest.mark.parametrize("count", [0, 1, 4, 7])
def test_chain_is_the_general_tree_with_chain_parents(count):
    root = jnp.asarray([7, 8, 9], jnp.int32)
    drafts = jnp.arange(3 * count, dtype=jnp.int32).reshape(3, count)
    for num_drafts in (None, jnp.asarray([0, count // 2, count], jnp.int32)):
        chain = trees.chain(root, drafts, num_drafts)
        general = make(np.asarray(chain.parents), max_depth=count)
        assert chain.is_chain
        assert chain.max_depth == count
        assert chain.tokens[:, 0].tolist() == [7, 8, 9]
        assert (chain.tokens[:, 1:] == drafts).all()
        assert (mask_of(chain) == mask_of(general)).all()
        expected = [count] * 3 if num_drafts is None else num_drafts.tolist()
        assert trees.num_draft_tokens(chain).tolist() == expected
        used = np.asarray(trees.used(chain))
        depth = np.asarray(trees.depths(mask_of(chain)))
        assert (depth[used] == np.broadcast_to(np.arange(count + 1), used.shape)[used]).all()


TOPK, LEVELS = 3, 3


@functools.cache
def selector(num_nodes: int):
    return jax.jit(lambda c, root: trees.select(c, root, num_nodes, LEVELS))


def expansion(rng: np.random.Generator, batch: int, ties: bool) -> Candidates:
    """A full level-wise expansion as EAGLE makes it: the best of each level get the children of the next."""
    tokens = rng.integers(0, 100, (batch, trees.num_candidates(TOPK, LEVELS)))
    scores, parents = np.zeros(tokens.shape, np.float32), np.full(tokens.shape, -1)
    drop = lambda *shape: -(rng.integers(0, 2, shape) if ties else rng.random(shape))
    for b in range(batch):
        scores[b, :TOPK] = np.sort(drop(TOPK))[::-1]
        frontier, end = np.arange(TOPK), TOPK
        for _ in range(1, LEVELS):
            new = np.arange(end, end + TOPK * TOPK)
            parents[b, new] = np.repeat(frontier, TOPK)
            scores[b, new] = scores[b, parents[b, new]] + drop(TOPK * TOPK)
            frontier, end = new[np.argsort(-scores[b, new], kind="stable")[:TOPK]], new[-1] + 1
    as_int = lambda x: jnp.asarray(x, jnp.int32)
    return Candidates(tokens=as_int(tokens), scores=jnp.asarray(scores), parents=as_int(parents))


@SETTINGS
@hypothesis.given(strategies.seeds(), st.sampled_from([2, 5, 12, 22]), st.booleans())
def test_select_keeps_the_best_with_their_ancestors_in_the_order_found(seed, num_nodes, ties):
    candidates = expansion(np.random.default_rng(seed), 2, ties)
    tree = selector(num_nodes)(candidates, jnp.asarray([5, 6], jnp.int32))
    assert tree.tokens.shape == (2, num_nodes)
    assert tree.tokens[:, 0].tolist() == [5, 6]
    for b in range(2):
        scores = np.asarray(candidates.scores[b])
        chosen = np.sort(np.argsort(-scores, kind="stable")[: num_nodes - 1])
        parent = np.asarray(candidates.parents[b])[chosen]
        assert set(parent[parent >= 0]) <= set(chosen)
        expected = [0 if p < 0 else 1 + chosen.tolist().index(p) for p in parent]
        found = np.asarray(tree.parents[b])
        assert found.tolist() == [-1, *expected]
        assert (found[1:] < np.arange(1, num_nodes)).all()
        assert (np.asarray(tree.tokens[b, 1:]) == np.asarray(candidates.tokens[b])[chosen]).all()


def test_ties_go_to_the_candidate_found_first():
    """Four children tie for two places: the first level's are taken, in their order."""
    candidates = Candidates(
        tokens=jnp.asarray([[10, 11, 20, 21, 22, 23]], jnp.int32),
        scores=jnp.asarray([[-1.0, -1.0, -1.0, -1.0, -1.0, -1.0]]),
        parents=jnp.asarray([[-1, -1, 0, 0, 1, 1]], jnp.int32),
    )
    tree = trees.select(candidates, jnp.asarray([3], jnp.int32), 5, 2)
    assert tree.tokens.tolist() == [[3, 10, 11, 20, 21]]
    assert tree.parents.tolist() == [[-1, 0, 0, 1, 1]]


def test_num_candidates_counts_the_expansion():
    assert trees.num_candidates(10, 6) == 10 + 5 * 100
    assert trees.num_candidates(1, 4) == 4
    assert trees.num_candidates(TOPK, LEVELS) == 21
