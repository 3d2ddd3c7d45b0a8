"""EAGLE trees against those that upstream EAGLE recorded: nodes, masks, positions, acceptances, outputs.

`goldens/eagle2-tiny.safetensors` holds five rounds for six prompts under five tree settings. Where the recorded score
margins exceed float32 noise the trees are equal; elsewhere candidates of nearly equal score may change places.
"""

import functools
import json
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from safetensors.numpy import load_file

from specjax import checkpoints, verify
from specjax.checkpoints import heads
from specjax.decoding import sampling as sample
from specjax.decoding import tree as trees
from specjax.decoding.tree import Tree
from specjax.drafters.base import Chunk
from specjax.drafters.eagle import eagle
from specjax.engine import decode as decoding
from specjax.models import cache as kv
from specjax.models import layers, llama
from specjax.quant import rotation
from specjax.quantize import heads as rotated_heads
from specjax.quantize import rotate
from tests import paths, planned, tiny

MARGIN = 2e-4
PROMPTS, ROUNDS, CAPACITY = 6, 5, 192
TARGETS = {
    "eagle2-tiny": "tiny-fp16",
    "eagle3-tiny": "tiny8-fp16",
    "rotation-eagle2-tiny": "rotation-tiny",
}
SETTINGS = ("d5k10n60", "d6k10n60", "d3k4n12", "d6k2n14", "d5k1n6")
FAST = {
    ("eagle2-tiny", "d5k10n60"),
    ("eagle3-tiny", "d3k4n12"),
    ("rotation-eagle2-tiny", "d3k4n12"),
}


@functools.cache
def golden(head: str, complete: bool = False) -> dict[str, np.ndarray]:
    """What upstream recorded; the copy beside the tests has the rounds of FAST only."""
    return load_file((paths.full_golden if complete else paths.golden)(f"{head}.safetensors"))


@functools.cache
def settings(head: str) -> dict[str, dict]:
    with open(paths.golden(f"{head}.json")) as file:
        return {row["name"]: row for row in json.load(file)["settings"]}


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def record(target, drafter, tokens, lengths):
    """Prefills the prompts in one batch and decodes `ROUNDS` steps; returns what stood after each."""
    batch, width = tokens.shape[0], tokens.shape[1] - 1
    greedy, no_stop = sample.sampling(), jnp.asarray([-1], jnp.int32)
    state = decoding.init_state(target, drafter, batch, CAPACITY, 64)
    state = replace(state, limit=jnp.full((batch,), 64, jnp.int32))
    chunk = Chunk(
        tokens=tokens[:, :width],
        next_tokens=tokens[:, 1:],
        start=jnp.zeros((batch,), jnp.int32),
        valid=lengths,
        features=None,
    )
    state = decoding.prefill_chunk(target, drafter, state, chunk, lengths, no_stop, greedy)

    def step(state, _):
        state = decoding.step(target, drafter, state, no_stop, greedy, verify.Greedy())
        nodes, parents = state.draft.tokens, state.draft.parents
        mask = trees.ancestor_mask(Tree(tokens=nodes, parents=parents, max_depth=drafter.max_depth))
        return state, (nodes, mask, trees.depths(mask), state.lengths, state.root)

    state, rounds = lax.scan(step, state, None, ROUNDS)
    return rounds, state.tokens, state.num_tokens


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A recorded round: the tree, and the score of every candidate by its path of tokens."""

    tokens: np.ndarray
    mask: np.ndarray
    positions: np.ndarray
    scores: dict[tuple[int, ...], float]
    margins: np.ndarray


def recording(data, prefix: str, topk: int) -> Recording:
    get = lambda name: data[f"{prefix}.{name}"]
    tokens, parents = get("cand_tokens").tolist(), get("cand_parents").tolist()
    lines: list[tuple[int, ...]] = []
    for index, token in enumerate(tokens):
        above = parents[index // topk]
        lines.append((*(lines[above - 1] if above else ()), token))
    return Recording(
        tokens=get("draft_tokens"),
        mask=get("tree_mask").astype(bool),
        positions=get("tree_position_ids"),
        scores=dict(zip(lines, get("cand_scores").tolist(), strict=True)),
        margins=get("margins"),
    )


def node_paths(tokens, mask) -> set[tuple[int, ...]]:
    """Each node but the root as the tokens on the way to it."""
    return {tuple(tokens[np.flatnonzero(row)][1:].tolist()) for row in mask[1:]}


def check_tree(tokens, mask, positions, expected: Recording) -> bool:
    """Whether the tree is exactly the recorded one; fails unless it is that up to swaps of near-equal candidates."""
    same = (
        (tokens == expected.tokens).all()
        and (mask == expected.mask).all()
        and (positions == expected.positions).all()
    )
    if expected.margins.min() >= MARGIN:
        assert same, "the tree differs although no decision in it was close"
    ours, theirs = node_paths(tokens, mask), node_paths(expected.tokens, expected.mask)
    cut = min(expected.scores[path] for path in theirs)
    assert all(expected.scores[path] >= cut - MARGIN for path in ours - theirs)
    assert all(expected.scores[path] <= cut + MARGIN for path in theirs - ours)
    return bool(same)


CASES = [
    pytest.param(
        head,
        name,
        marks=() if (head, name) in FAST else pytest.mark.slow,
        id=f"{head}-{name}",
    )
    for head in TARGETS
    for name in SETTINGS
]


@pytest.mark.parametrize(("head", "name"), CASES)
def test_trees_and_acceptances_are_upstreams(head, name):
    data, shape = golden(head, (head, name) not in FAST), settings(head)[name]
    target = tiny.fixture_model(TARGETS[head])
    network = tiny.fixture_head(head, TARGETS[head])
    drafter = eagle(network, shape["depth"] + 1, shape["top_k"], shape["total_token"])
    prompts = [data[f"p{p}.input_ids"] for p in range(PROMPTS)]
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((PROMPTS, lengths.max() + 1), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    rounds, outputs, counts = jax.tree.map(
        np.asarray,
        record(target, planned.Recorder(inner=drafter), jnp.asarray(tokens), jnp.asarray(lengths)),
    )
    exact = close = 0
    for p in range(PROMPTS):
        before = lengths[p]
        for r in range(ROUNDS):
            *tree, after, root = (field[r, p] for field in rounds)
            prefix = f"p{p}.{name}.r{r}"
            expected = recording(data, prefix, shape["top_k"])
            exact += check_tree(*tree, expected)
            close += expected.margins.min() < MARGIN
            assert after - before - 1 == data[f"{prefix}.accept_length"], prefix
            assert root == data[f"{prefix}.next_root"], prefix
            before = after
        begin = lengths[p]
        produced = outputs[p, : counts[p]]
        assert (produced == data[f"p{p}.greedy_ids"][begin : begin + counts[p]]).all()
        upstream = data[f"p{p}.{name}.output_ids"][begin:][: counts[p]]
        assert (produced[: len(upstream)] == upstream).all()
    print(f"{head} {name}: {exact} of {PROMPTS * ROUNDS} trees exact, {close} had close decisions")
    assert exact >= PROMPTS * ROUNDS - close


@pytest.mark.parametrize("head", TARGETS)
def test_head_computes_upstreams_features(head):
    """Recorded inputs of the head's first pass give its recorded outputs."""
    data = golden(head)
    target, network = tiny.fixture_model(TARGETS[head]), tiny.fixture_head(head, TARGETS[head])
    features = jnp.asarray(data["p0.d3k4n12.r0.features_in"])[None]
    text = data["p0.greedy_ids"][1 : 1 + features.shape[1]]
    block = layers.causal_block(jnp.asarray(text, jnp.int32)[None], jnp.zeros((1,), jnp.int32))
    cache = kv.init(network.config, 1, features.shape[1], jnp.float32, num_layers=1)
    found, _ = jax.jit(lambda f: network(network.fuse(f), block, cache, target))(features)
    expected = data["p0.d3k4n12.r0.head_out_prefill"]
    assert np.abs(np.asarray(found)[0] - expected).max() < 1e-4


def test_rotated_head_computes_the_plain_heads_logits(tmp_path):
    """The rotation is applied to float32 weights; with the stored fp16 ones upstream's own golden holds (above)."""
    checkpoint = checkpoints.open_checkpoint(paths.fixture("tiny-fp16"))
    turn = rotation.load(paths.fixture("rotation-tiny") / "rotation.pth")
    folder = rotated_heads.rotate_head(
        paths.fixture("eagle2-tiny"), checkpoint, turn, tmp_path / "head"
    )
    plain = llama.build(checkpoint, jnp.float32)
    turned = rotate.rotate(plain, turn)
    pairs = [
        (plain, heads.load_eagle(paths.fixture("eagle2-tiny"), plain, "plain")),
        (turned, heads.load_eagle(folder, turned, "rotated")),
    ]
    text = jnp.asarray(tiny.prompts()[2], jnp.int32)[None]
    start = jnp.zeros((1,), jnp.int32)

    @jax.jit
    def logits(target, network):
        empty = kv.init(target.config, 1, text.shape[1], jnp.float32)
        features = target(layers.causal_block(text[:, :-1], start), empty).hidden
        empty = kv.init(network.config, 1, text.shape[1], jnp.float32, num_layers=1)
        block = layers.causal_block(text[:, 1:], start)
        hidden, _ = network(network.fuse(features), block, empty, target)
        return network.logits(hidden, target)

    expected, found = (np.asarray(logits(*pair)) for pair in pairs)
    print(f"largest difference {np.abs(found - expected).max():.2e}")
    assert np.abs(found - expected).max() <= 1e-4
