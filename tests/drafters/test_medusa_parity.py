"""Medusa heads and trees against what upstream Medusa recorded: buffers, logits, candidates, acceptances, outputs.

`goldens/medusa-tiny.safetensors` holds two published trees over six prompts, 24 rounds each, the first five in detail.
"""

import functools
import json
import types
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from safetensors.numpy import load_file

from specjax import verify
from specjax.checkpoints import heads
from specjax.checkpoints.head_folder import HeadFolder
from specjax.decoding import sampling as sample
from specjax.decoding import target as passes
from specjax.decoding import tree as trees
from specjax.decoding.tree import Tree
from specjax.drafters import head as opening
from specjax.drafters.arrangements import BestFirst
from specjax.drafters.base import Chunk
from specjax.drafters.head_options import HeadOptions
from specjax.drafters.medusa import medusa
from specjax.engine import decode as decoding
from specjax.models import cache as kv
from specjax.models.one_pass import Rows
from tests import paths, planned, tiny

TREES = ("mc_sim_7b_63", "vicuna_7b_stage2")
PROMPTS, ROUNDS, DETAILED, TOP = 6, 24, 5, 10
TOLERANCE = 1e-4


@functools.cache
def golden() -> dict[str, np.ndarray]:
    return load_file(paths.golden("medusa-tiny.safetensors"))


@functools.cache
def drafter(name: str):
    loaded, named = heads.load_medusa(paths.fixture("medusa-tiny"), tiny.fixture_model())
    return medusa(loaded, named[name])


def prompts() -> tuple[np.ndarray, np.ndarray]:
    """Tokens [prompts, T + 1], zeros behind, and lengths."""
    texts = [golden()[f"p{p}.input_ids"] for p in range(PROMPTS)]
    lengths = np.asarray([len(text) for text in texts], np.int32)
    tokens = np.zeros((PROMPTS, lengths.max() + 1), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    return tokens, lengths


def shape_of(name: str) -> Tree:
    """The tree's form as `propose` builds it, with each node's candidate index for a token."""
    choices = drafter(name).choices
    node_of = {(): 0} | {path: i + 1 for i, path in enumerate(choices)}
    parents = [-1] + [node_of[path[:-1]] for path in choices]
    indices = [0] + [1 + (len(path) - 1) * TOP + path[-1] for path in choices]
    return Tree(
        tokens=jnp.asarray([indices], jnp.int32),
        parents=jnp.asarray([parents], jnp.int32),
        max_depth=drafter(name).max_depth,
    )


@pytest.mark.parametrize("name", TREES)
def test_buffers_are_upstreams(name):
    """Mask, positions, head ranks and root-to-leaf paths; nodes stand in the same order."""
    tree = shape_of(name)
    mask = np.asarray(trees.ancestor_mask(tree))[0]
    data = {key: golden()[f"buffers.{name}.{key}"] for key in ("medusa_attn_mask", "tree_indices")}
    assert (mask == data["medusa_attn_mask"].astype(bool)).all()
    assert (np.asarray(tree.tokens)[0] == data["tree_indices"]).all()
    depths = np.asarray(trees.depths(jnp.asarray(mask)[None]))[0]
    assert (depths == golden()[f"buffers.{name}.medusa_position_ids"]).all()
    leaves = [node for node in range(len(mask)) if mask[:, node].sum() == 1]
    found = {tuple(np.flatnonzero(mask[leaf]).tolist()) for leaf in leaves}
    rows = golden()[f"buffers.{name}.retrieve_indices"]
    assert found == {tuple(row[row >= 0].tolist()) for row in rows}


def test_head_logits_are_upstreams():
    target, data = tiny.fixture_model(), golden()
    network = drafter(TREES[0]).heads

    @jax.jit
    def logits(target, network, tokens):
        cache = kv.init(target.config, 1, tokens.shape[1], jnp.float32)
        out, features = passes.forward_chunk(
            target, tokens, jnp.zeros((1,), jnp.int32), cache, "final"
        )
        return target.logits(out.hidden)[0], network(features[0])

    base, found = logits(target, network, jnp.asarray(data["p0.input_ids"])[None])
    rows = data["p0.base_logits"].shape[0]
    base, found = np.asarray(base)[:rows], np.asarray(found).swapaxes(0, 1)[:, :rows]
    assert np.abs(base - data["p0.base_logits"]).max() <= TOLERANCE
    assert np.abs(found - data["p0.medusa_logits"]).max() <= TOLERANCE


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def record(target, proposer, tokens, lengths):
    """Prefills all prompts in one batch and decodes; returns what stood after the prompts and after each round."""
    greedy, no_stop = sample.sampling(), jnp.asarray([-1], jnp.int32)
    room = ROUNDS * (proposer.max_depth + 1)
    capacity = tokens.shape[1] + room + proposer.scratch
    state = decoding.init_state(target, proposer, PROMPTS, capacity, room)
    state = replace(state, limit=jnp.full((PROMPTS,), room, jnp.int32))
    chunk = Chunk(
        tokens=tokens[:, :-1],
        next_tokens=tokens[:, 1:],
        start=jnp.zeros((PROMPTS,), jnp.int32),
        valid=lengths,
        features=None,
    )
    state = decoding.prefill_chunk(target, proposer, state, chunk, lengths, no_stop, greedy)
    best = lax.top_k(proposer.inner.heads(state.draft.inner.feature), TOP)[1]

    def step(state, _):
        before = state.lengths
        state = decoding.step(target, proposer, state, no_stop, greedy, verify.Greedy())
        return state, (state.draft.tokens, state.lengths - before - 1)

    state, rounds = lax.scan(step, state, None, ROUNDS)
    return best, rounds, state.tokens, state.num_tokens


@functools.cache
def recorded(name: str):
    tokens, lengths = prompts()
    proposer = planned.Recorder(inner=drafter(name))
    found = record(tiny.fixture_model(), proposer, jnp.asarray(tokens), jnp.asarray(lengths))
    return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize("name", TREES)
def test_candidates_acceptances_and_outputs_are_upstreams(name):
    data = golden()
    best, (nodes, accepted), outputs, counts = recorded(name)
    with open(paths.golden("medusa-tiny.json")) as file:
        summary = json.load(file)["prompts"]
    close = 0
    for p in range(PROMPTS):
        prefix = f"p{p}.{name}"
        assert (best[p] == data[f"p{p}.medusa_topk"]).all()
        for r in range(DETAILED):
            close += data[f"{prefix}.r{r}.topk_margin"] < 2e-4
            assert (nodes[r, p] == data[f"{prefix}.r{r}.tree_candidates"]).all(), (prefix, r)
            assert accepted[r, p] == data[f"{prefix}.r{r}.accept_length"], (prefix, r)
        assert accepted[:, p].tolist() == data[f"{prefix}.accept_lengths"].tolist()
        assert accepted[:, p].tolist() == summary[p][name]["accept_lengths"]
        upstream = data[f"{prefix}.output_ids"][len(data[f"p{p}.input_ids"]) :]
        produced = outputs[p, : counts[p]]
        size = min(len(upstream), len(produced))
        assert size >= ROUNDS
        assert (produced[:size] == upstream[:size]).all(), prefix
    assert close == 0, "no recorded decision was close, so everything was compared exactly"


def test_the_heads_are_slots_of_one_pass():
    """`head` opens the folder too; each slot is a head at the last known position, others' rows do not matter."""
    target = types.SimpleNamespace(
        module=tiny.fixture_model(), config=tiny.fixture_model().config, name="tiny-fp16"
    )
    folder = HeadFolder(paths.fixture("medusa-tiny"))
    made = opening.kind_of(folder).build(folder, target, HeadOptions())
    assert isinstance(made.arrangement, BestFirst) and made.max_depth == 4
    width = target.config.hidden_size
    features = jax.random.normal(jax.random.key(0), (2, 5, width))
    zeros = jnp.zeros((2, 5), jnp.int32)
    counts = jnp.asarray([2, 5], jnp.int32)
    rows = Rows(features=features, tokens=zeros, start=zeros[:, 0], count=counts)
    cache = made.head.init_cache(2, 8)
    hidden, _ = made.head.draft(rows, zeros[:, 0], cache, target.module)
    expected = drafter("mc_sim_7b_63").heads(jnp.stack([features[0, 1], features[1, 4]]))
    found = made.head.logits(hidden[:, :3], target.module)
    np.testing.assert_allclose(found, expected[:, :3], atol=1e-5)
