"""Selection of tree nodes by hand-made trees and scores, and what it does to a pass."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from specjax.decoding import target as target_pass
from specjax.decoding import tree as trees
from specjax.decoding.tree import Tree
from specjax.depth import selection
from specjax.depth.selection import Selection
from tests import tiny
from tests.depth import models
from tests.depth import test_routed as routing

# 0 -> 1, 2; 1 -> 3, 4; 2 -> 5; 5 -> 6
PARENTS = (-1, 0, 0, 1, 1, 2, 5)
TOKENS = tuple(range(10, 17))


def tree(parents=PARENTS, max_depth=3) -> Tree:
    return Tree(
        tokens=jnp.asarray([TOKENS[: len(parents)]], jnp.int32),
        parents=jnp.asarray([parents], jnp.int32),
        max_depth=max_depth,
    )


def path(scores, parents=PARENTS, max_depth=3) -> list[int]:
    found = selection.predicted_path(tree(parents, max_depth), jnp.asarray([scores], jnp.float32))
    return np.flatnonzero(found[0]).tolist()


def test_nodes_below_the_mean_fall_with_their_subtrees():
    # Mean 0.67. Node 2 falls and takes 5 and 6 along, whatever these score; of 3 and 4 only one remains.
    assert path([0.9, 0.8, 0.2, 0.3, 0.7, 0.9, 0.9]) == [0, 1, 4]
    # Mean 0.41. Nodes 3 and 4 fall, and node 1 becomes a leaf; the deeper path weighs more.
    assert path([0.6, 0.5, 0.45, 0.1, 0.0, 0.6, 0.6]) == [0, 2, 5, 6]
    # Both children of the root fall: the root itself is the leaf.
    assert path([1.0, 0.1, 0.1, 0.9, 0.9, 0.9, 0.9]) == [0]


def test_a_root_below_the_mean_means_that_nothing_is_dropped():
    # Mean 0.39; node 1 is far below it, but node 0 is too. Leaves 3 and 4 tie: the first one wins.
    scores = [0.1, 0.05, 0.3, 0.95, 0.95, 0.2, 0.2]
    assert 0.05 * math.log(2) + 0.95 * math.log(3) > 0.3 * math.log(2) + 0.2 * math.log(3) + 0.2
    assert path(scores) == [0, 1, 3]
    # With a root above the mean (0.51) both branches fall; of better ones (mean 0.75) only node 1's does.
    assert path([0.9, *scores[1:]]) == [0]
    assert path([0.9, 0.05, 0.8, 0.95, 0.95, 0.8, 0.8]) == [0, 2, 5, 6]
    # Mean 0.59, root below: nothing falls, and the whole tree's best leaf is another one than above.
    assert path([0.5, 0.05, 0.6, 0.9, 0.9, 0.6, 0.6]) == [0, 2, 5, 6]


def test_depths_weigh_as_in_the_released_code():
    wanted = [0.0, math.log(2), math.log(3), 1.0, 1 / math.cosh(1), 1 / math.cosh(2)]
    np.testing.assert_allclose(selection._weights(5), wanted, rtol=1e-6)
    # A chain beside a short branch; all scores equal, so that nothing falls: the longest path wins.
    assert path([0.5] * 7, (-1, 0, 0, 1, 3, 4, 5), 5) == [0, 1, 3, 4, 5, 6]


def test_unused_nodes_take_no_part():
    # Nodes 5 and 6 are unused: neither their scores nor their number count for the mean (0.5).
    parents = (-1, 0, 0, 1, 2, -1, -1)
    scores = [0.6, 0.4, 0.6, 0.4, 0.5, 1e6, -1e6]
    assert path(scores, parents) == [0, 2, 4]
    assert path([0.5, 9.0, 9.0], (-1, -1, -1)) == [0]


def reference(parents, scores) -> list[int]:
    """The rule as a walk over a tree of dictionaries."""
    used = [0] + [n for n in range(1, len(parents)) if parents[n] >= 0]
    mean = float(np.mean([scores[n] for n in used]))
    children = {n: [m for m in used if m > 0 and parents[m] == n] for n in used}
    if scores[0] >= mean:
        children = {n: [m for m in kids if scores[m] >= mean] for n, kids in children.items()}
    leaves, waiting = {}, [(0, (0,))]
    while waiting:
        node, route = waiting.pop()
        if not children[node]:
            terms = [(math.log(d + 1) if d < 3 else 1 / math.cosh(d - 3)) for d in range(9)]
            leaves[node] = sum(scores[n] * terms[d] for d, n in enumerate(route)), route
        waiting += [(child, (*route, child)) for child in children[node]]
    best = max(value for value, _ in leaves.values())
    return sorted(min(leaf for leaf in leaves.items() if leaf[1][0] == best)[1][1])


@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(1, 9))
@hypothesis.settings(max_examples=40, deadline=None)
def test_random_trees(seed, used):
    rng = np.random.default_rng(seed)
    parents = [-1] + [int(rng.integers(0, n)) for n in range(1, used)] + [-1] * (9 - used)
    # Fractions of 64: means and sums are exact or far apart, but for ties that both see.
    scores = (rng.integers(0, 64, 9) / 64).tolist()
    drafted = Tree(tokens=jnp.zeros((1, 9), jnp.int32), parents=jnp.asarray([parents]), max_depth=8)
    given = jnp.asarray([scores], jnp.float32)
    wanted = reference(parents, scores)
    found = np.flatnonzero(selection.predicted_path(drafted, given)[0]).tolist()
    if found != wanted:
        terms = selection._weights(8)
        value = lambda nodes: sum(scores[n] * terms[d] for d, n in enumerate(nodes))
        assert value(found) == pytest.approx(value(wanted), abs=1e-5), (found, wanted)
    kept = np.asarray(selection.survivors(drafted, given, 4))[0].tolist()
    check_subtree(parents, kept, scores)


def check_subtree(parents, kept, scores) -> None:
    """Connected, in order, with the root, and nobody left out is worth more than who was kept."""
    assert kept[0] == 0 and kept == sorted(set(kept))

    def worth(node):
        return min(scores[node], worth(parents[node])) if node > 0 else math.inf

    present = [node for node in kept if node == 0 or parents[node] >= 0]
    assert all(parents[node] in present for node in present[1:])
    others = [n for n in range(1, len(parents)) if parents[n] >= 0 and n not in kept]
    if others:
        assert len(present) == len(kept)
        assert max(map(worth, others)) <= min(map(worth, present[1:]), default=math.inf)


def test_survivors_are_the_best_connected_nodes():
    scores = jnp.asarray([[0.0, 0.9, 0.5, 0.2, 0.8, 0.99, 0.4]])
    # Node 5 is worth no more than its parent 2 (0.5), and comes with it.
    assert selection.survivors(tree(), scores, 4)[0].tolist() == [0, 1, 2, 4]
    assert selection.survivors(tree(), scores, 5)[0].tolist() == [0, 1, 2, 4, 5]
    assert selection.survivors(tree(), scores, 1)[0].tolist() == [0]
    small = trees.subset(tree(), selection.survivors(tree(), scores, 5))
    assert small.tokens[0].tolist() == [10, 11, 12, 14, 15]
    assert small.parents[0].tolist() == [-1, 0, 0, 1, 2]
    assert small.kept[0].tolist() == [0, 1, 2, 4, 5] and small.max_depth == 3
    # Fewer used nodes than places: the rest stays unused.
    sparse = tree((-1, -1, 0, -1, -1, 2, -1))
    small = trees.subset(sparse, selection.survivors(sparse, scores, 4))
    assert small.tokens[0].tolist() == [10, 11, 12, 15]
    assert small.parents[0].tolist() == [-1, -1, 0, 2]
    # A chain is cut.
    chain = trees.chain(jnp.asarray([5]), jnp.asarray([[6, 7, 8, 9]]), jnp.asarray([3]))
    kept = selection.survivors(chain, jnp.asarray([[0.5, 0.1, 0.9, 0.9, 0.9]]), 3)
    assert kept[0].tolist() == [0, 1, 2] and trees.subset(chain, kept).is_chain


@pytest.fixture
def hurry():
    with tiny.hurried_compiler():
        yield


def forward(mode, drafted, cache, lengths, needs=None, survivors=4, layer=2, live=None, base=None):
    base = base or models.routed()
    if mode != "off":
        chosen = Selection(mode=mode, survivors=survivors)
        base = models.selecting(base, chosen, models.predictor(layer))
    return routing.forward_tree(base, drafted, cache, lengths, needs, live)


@pytest.mark.usefixtures("hurry")
def test_vote_narrows_who_votes_from_the_predictors_layer_on():
    """Replays a pass layer by layer: below K all used nodes vote, from K on the predicted path does."""
    target, layer = models.routed(), 2
    saved = 0
    for seed in range(4):
        cache, lengths = routing.prefilled(target, routing.PROMPTS[:1])
        drafted = routing.tree_of(1, seed)
        _, features, after, sent = forward("vote", drafted, cache, lengths, (0, 1, 2, 3))
        assert sent.kept is None
        inputs = jnp.split(features, 4, axis=-1)
        on_path = np.asarray(
            selection.predicted_path(drafted, models.predictor(layer)(inputs[layer]))
        )
        wanted, narrow = [1], 0
        for index in range(1, 4):
            executes = np.asarray(target.depth.routers[index - 1].executes(inputs[index]))
            voters = on_path if index >= layer else np.ones_like(on_path)
            wanted.append(int((executes & voters).any()))
            narrow += executes.any() and not wanted[-1]
            valid = np.asarray(after.depth.valid[index - 1])[0, 9 : 9 + 8]
            np.testing.assert_array_equal(valid, executes[0] * wanted[-1])
            if not wanted[-1]:
                np.testing.assert_array_equal(after.keys[index], cache.keys[index])
        assert after.depth.runs[0].tolist() == wanted
        saved += narrow
    assert saved, "nowhere was a layer skipped against the vote of a node off the path"


@pytest.mark.usefixtures("hurry")
def test_prune_goes_on_with_the_survivors_only():
    """The rows of the survivors are those of a pass over their tree alone."""
    target = models.routed()
    cache, lengths = routing.prefilled(target, routing.PROMPTS[:3])
    drafted = routing.tree_of(3)
    logits, features, after, sent = forward("prune", drafted, cache, lengths, (1, 3))
    assert logits.shape[1] == features.shape[1] == sent.num_nodes == 4
    scores = models.predictor(2)(forward("off", drafted, cache, lengths, (2,))[1])
    np.testing.assert_array_equal(sent.kept, selection.survivors(drafted, scores, 4))
    alone = trees.subset(drafted, sent.kept)
    wanted, rows, other, _ = forward("off", alone, cache, lengths, (1, 3))
    np.testing.assert_allclose(logits, wanted, atol=1e-4)
    np.testing.assert_allclose(features, rows, atol=1e-4)
    for b, length in enumerate(np.asarray(lengths)):
        stop = length + 4
        for mine, theirs in zip(after.depth.valid, other.depth.valid, strict=True):
            np.testing.assert_array_equal(mine[b, :stop], theirs[b, :stop])
        for mine, theirs in zip(after.keys, other.keys, strict=True):
            used = np.abs(mine[b, :, :stop] - theirs[b, :, :stop]).max(axis=(0, 2)) > 1e-4
            assert not used[:length].any()


@pytest.mark.slow
@pytest.mark.usefixtures("hurry")
def test_rows_that_fill_up_a_tile_change_nothing(monkeypatch):
    """GPUs take eight rows at once; the rows behind the nodes neither vote nor survive."""
    cache, lengths = routing.prefilled(models.routed(bias=-2.0), routing.PROMPTS[:2])
    drafted = routing.tree_of(2, parents=routing.PARENTS[:6])

    def passes():
        found = []
        for mode in selection.MODES:
            base = models.routed(bias=-2.0)
            logits, features, after, sent = forward(
                mode, drafted, cache, lengths, (1, 3), survivors=3, base=base
            )
            found.append((logits, features, sent, after.depth.runs))
        return found

    exact = passes()
    jax.clear_caches()
    monkeypatch.setattr(target_pass, "padded_nodes", lambda count: -(-count // 8) * 8)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(close, passes(), exact)
    jax.clear_caches()


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize(
    ("mode", "name"),
    [
        pytest.param("vote", "eagle", marks=pytest.mark.slow),
        ("prune", "eagle"),
        pytest.param("prune", "ngram", marks=pytest.mark.slow),
        *(pytest.param(mode, "lm", marks=pytest.mark.slow) for mode in ("vote", "prune")),
        *(pytest.param(mode, "medusa", marks=pytest.mark.slow) for mode in ("vote", "prune")),
    ],
)
def test_decoding_with_selection(mode, name):
    """Labelled lossy; every step accepts within what survived; who ends early leaves its slot to the next."""
    target, parts = models.routed(), tiny.Parts(models.routed())
    chosen = models.selecting(target, Selection(mode=mode, survivors=3), models.predictor())
    jobs = tiny.requests(routing.PROMPTS, 12)
    done = tiny.run(tiny.engine(chosen, tiny.DRAFTERS[name](parts), trace=True), jobs, 3)
    for completion in done:
        metrics = completion.metrics
        assert len(completion.output_ids) == 12 and not metrics.lossless
        assert len(metrics.layer_runs) == 4
        tokens = completion.output_ids[:1]
        for step in metrics.trace:
            tokens += [*step.accepted, step.token]
            assert mode == "vote" or len(step.drafted) <= 2
        assert tokens[:12] == completion.output_ids


@pytest.mark.usefixtures("hurry")
def test_a_tree_of_one_node_has_nothing_to_select():
    cache, lengths = routing.prefilled(models.routed(), routing.PROMPTS[:2])
    one = routing.tree_of(2, parents=routing.PARENTS[:1])
    plain = forward("off", one, cache, lengths)
    for mode in ("vote", "prune"):
        jax.tree.map(np.testing.assert_array_equal, forward(mode, one, cache, lengths), plain)
    chosen = models.selecting(models.routed(), Selection(mode="vote"), models.predictor())
    assert chosen.depth.lossless(1) and not chosen.depth.lossless(2)


@pytest.mark.usefixtures("hurry")
def test_pruned_drafts_are_judged_by_their_own_distributions():
    """Sampling from a draft model reads q of the nodes that survived."""
    target = models.routed()
    chosen = models.selecting(target, Selection(mode="prune", survivors=3), models.predictor())
    drafter = tiny.DRAFTERS["self"](tiny.Parts(target))
    done = tiny.run(
        tiny.engine(chosen, drafter, temperature=1.0), tiny.requests(routing.PROMPTS[:3], 12), 3
    )
    rejected = sum(c.metrics.num_draft_tokens - c.metrics.num_accepted_draft_tokens for c in done)
    # The target drafts for itself and nothing of the path is left out of a cut chain: all is accepted.
    assert rejected == 0 and all(c.metrics.mean_acceptance_length == 3 for c in done)
