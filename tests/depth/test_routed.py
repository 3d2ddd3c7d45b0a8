"""Routed decoding: what it computes, what it does not compute, and that stale slots are never seen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import verify
from specjax.config.depth import DepthConfig
from specjax.decoding import sampling as sample
from specjax.decoding import target as passes
from specjax.decoding import tree as trees
from specjax.decoding.tree import Tree
from specjax.depth import router as routing
from specjax.drafters.ngram import Ngram
from specjax.drafters.none import NoDraft
from specjax.engine import decode as decoding
from specjax.errors import ConfigError, SpecjaxError
from specjax.models import cache as kv
from specjax.models import layers, llama
from specjax.models.prepare import prepare
from specjax.pallas.tree_attention import api
from tests import test_memory as memory
from tests import tiny
from tests.depth import models
from tests.depth.reference import Reference

PROMPTS = [np.random.default_rng(n).integers(0, 16, n).tolist() for n in (9, 5, 12, 3, 1)]
PARENTS = np.asarray([-1, 0, 0, 1, 1, 2, 3, 5], np.int32)

forward_chunk = jax.jit(passes.forward_chunk, static_argnames="needs")
forward_tree = jax.jit(passes.forward_tree, static_argnames="needs")


@pytest.fixture(autouse=True)
def hurry(request):
    if "memory" in request.node.name:
        yield
        return
    with tiny.hurried_compiler():
        yield


def reference(code_bits=None, seed=0):
    """The model of `models.routed` as the numpy reference has it."""
    checkpoint = tiny.RandomCheckpoint(models.CONFIG, seed)
    llama.build(checkpoint, jnp.float32)
    return Reference(checkpoint.params, models.CONFIG, models.routed(code_bits, seed).depth)


@pytest.mark.parametrize("code_bits", [None, 4])
def test_logits_are_those_of_the_masked_dense_reference(code_bits):
    target, wanted = models.routed(code_bits), reference(code_bits)
    for prompt in PROMPTS:
        logits, executed = wanted.routed(prompt)
        assert np.abs(tiny.full_logits(target, prompt) - logits).max() < 2e-4
        assert executed[:, :2].all() and executed[0].all()
    share = np.concatenate([wanted.routed(p)[1][1:, 2:].ravel() for p in PROMPTS]).mean()
    print(f"{share:.2f} of the routed layers run")
    assert 0.25 < share < 0.75


def test_autoregressive_decoding_is_the_masked_dense_reference_token_by_token():
    target, wanted = models.routed(), reference()
    done = tiny.run(tiny.engine(target, NoDraft()), tiny.requests(PROMPTS[:3], 16))
    for prompt, completion in zip(PROMPTS, done, strict=False):
        assert completion.output_ids == wanted.greedy(prompt, 16)
        text = prompt + completion.output_ids
        # A pass of one token runs a layer exactly if that token does.
        executed = wanted.routed(text)[1][:, len(prompt) : -1]
        assert completion.metrics.layer_runs == tuple(executed.sum(1))
        assert completion.metrics.executed_fraction == pytest.approx(executed.mean())
        assert 0.3 < completion.metrics.executed_fraction < 0.9


def prefilled(target, prompts, capacity=48):
    """Caches that hold some prompts, and their lengths."""
    lengths = jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)
    tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    cache = kv.init(target.config, len(prompts), capacity, target.dtype)
    start = jnp.zeros_like(lengths)
    return forward_chunk(target, jnp.asarray(tokens), start, cache, None)[0].cache, lengths


def tree_of(batch: int, seed: int = 0, parents=PARENTS) -> Tree:
    tokens = np.random.default_rng(seed).integers(0, 16, (batch, len(parents)))
    return Tree(
        tokens=jnp.asarray(tokens, jnp.int32),
        parents=jnp.broadcast_to(jnp.asarray(parents), tokens.shape),
        max_depth=4,
    )


def test_skipping_a_layer_is_masking_it():
    """A chain as a tree, whose layers may be skipped, and as a chunk, whose layers all run."""
    target, prompts = models.routed(bias=-1.0), PROMPTS[:1]
    cache, lengths = prefilled(target, prompts)
    skipped = 0
    for seed in range(6):
        tokens = np.random.default_rng(seed).integers(0, 16, (1, 3)).astype(np.int32)
        chain = trees.chain(jnp.asarray(tokens[:, 0]), jnp.asarray(tokens[:, 1:]))
        logits, _, after, _ = forward_tree(target, chain, cache, lengths, None)
        out, _ = forward_chunk(target, jnp.asarray(tokens), lengths, cache, None)
        np.testing.assert_allclose(logits, target.logits(out.hidden), atol=1e-5)
        for mine, theirs in zip(after.depth.valid, out.cache.depth.valid, strict=True):
            np.testing.assert_array_equal(mine, theirs)
        ran = np.asarray(after.depth.runs - cache.depth.runs)[0]
        skipped += (ran == 0).sum()
        for index in np.flatnonzero(ran == 0):
            np.testing.assert_array_equal(after.keys[index], cache.keys[index])
        assert not np.asarray(out.cache.depth.runs).any()
    assert skipped >= 3


def test_every_path_of_a_tree_is_a_text():
    target = models.routed()
    cache, lengths = prefilled(target, PROMPTS[:3])
    tree = tree_of(3)
    logits, features, _, _ = forward_tree(target, tree, cache, lengths, (1, 3))
    mask = np.asarray(trees.ancestor_mask(tree))
    for b, prompt in enumerate(PROMPTS[:3]):
        for node in range(tree.num_nodes):
            text = prompt + np.asarray(tree.tokens)[b, np.flatnonzero(mask[b, node])].tolist()
            wanted = tiny.full_logits(target, text)[-1]
            assert np.abs(np.asarray(logits)[b, node] - wanted).max() < 1e-4
    assert features.shape == (3, tree.num_nodes, 2 * 32)


def test_only_live_sequences_decide():
    target = models.routed()
    alone, lengths = prefilled(target, PROMPTS[:1])
    tree = tree_of(2, parents=PARENTS[:1])
    one = jax.tree.map(lambda leaf: leaf[:1], tree)
    wanted = forward_tree(target, one, alone, lengths, None)[2].depth.runs
    both, lengths = prefilled(target, [PROMPTS[0], PROMPTS[1]])
    live = jnp.asarray([True, False])
    runs = forward_tree(target, tree, both, lengths, None, live)[2].depth.runs
    np.testing.assert_array_equal(runs, [wanted[0], jnp.zeros_like(wanted[0])])
    together = forward_tree(target, tree, both, lengths, None)[2].depth.runs
    assert (together[0] >= runs[0]).all() and (together[0] == together[1]).all()


def poisoned(cache: kv.KVCache, lengths, start_layer: int = 1, value: float = 1e30) -> kv.KVCache:
    """Huge values wherever nothing valid stands, and flags set behind every sequence's end."""
    stale = jnp.arange(cache.capacity) >= lengths[:, None]
    always = (jnp.ones_like(stale),) * start_layer
    hidden = [(stale | ~valid)[:, None, :, None] for valid in (*always, *cache.depth.valid)]
    hidden[:start_layer] = [stale[:, None, :, None]] * start_layer
    put = lambda arrays: tuple(
        jnp.where(at, value, x) for at, x in zip(hidden, arrays, strict=True)
    )
    valid = tuple(valid | stale for valid in cache.depth.valid)
    depth = dataclasses.replace(cache.depth, valid=valid)
    return kv.KVCache(keys=put(cache.keys), values=put(cache.values), depth=depth)


def test_stale_slots_are_never_seen():
    target, tree = models.routed(), tree_of(3)
    clean, lengths = prefilled(target, PROMPTS[:3])
    dirty = poisoned(clean, lengths)
    hidden = [np.asarray(valid)[0, : int(lengths[0])] for valid in clean.depth.valid]
    assert not np.all(hidden), "some slot of the text is invalid"
    path = jnp.asarray([[0, 1, 3, 6], [0, 2, 5, 0], [0, 1, 0, 0]], jnp.int32)
    for accepted in ([4, 3, 1], [1, 2, 4]):
        wanted, _, clean, _ = forward_tree(target, tree, clean, lengths, None)
        found, _, dirty, _ = forward_tree(target, tree, dirty, lengths, None)
        np.testing.assert_array_equal(found, wanted)
        clean, dirty = (kv.compact(cache, lengths, path) for cache in (clean, dirty))
        lengths = lengths + jnp.asarray(accepted, jnp.int32)
        dirty = poisoned(dirty, lengths)
    for mine, theirs in zip(clean.depth.valid, dirty.depth.valid, strict=True):
        for b, length in enumerate(np.asarray(lengths)):
            np.testing.assert_array_equal(mine[b, :length], theirs[b, :length])


def test_a_reused_slot_gets_its_own_flag():
    """After a rollback the slots hold another text, of which nothing may be left."""
    target = models.routed()
    cache, lengths = prefilled(target, PROMPTS[:1])
    used = forward_tree(target, tree_of(1, seed=1), cache, lengths, None)[2]
    again = forward_tree(target, tree_of(1, seed=2), used, lengths, None)
    fresh = forward_tree(target, tree_of(1, seed=2), cache, lengths, None)
    np.testing.assert_array_equal(again[0], fresh[0])
    for mine, theirs in zip(again[2].depth.valid, fresh[2].depth.valid, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Meddler(Ngram):
    """Claims that all slots are valid and that all layers ran."""

    def propose(self, target, cache, state, root, lengths, keys, sampling):
        proposal = super().propose(target, cache, state, root, lengths, keys, sampling)
        depth = jax.tree.map(jnp.ones_like, cache.depth)
        return dataclasses.replace(proposal, cache=dataclasses.replace(cache, depth=depth))


jax.tree_util.register_dataclass(
    _Meddler,
    data_fields=[],
    meta_fields=[field.name for field in dataclasses.fields(Ngram)],
)


def test_what_a_drafter_writes_is_not_believed():
    target, found = models.routed(), []
    for drafter in (Ngram(draft_depth=2, ngram_min=1), _Meddler(draft_depth=2, ngram_min=1)):
        done = tiny.run(tiny.engine(target, drafter), tiny.requests(PROMPTS[:3], 16))
        found.append([(c.output_ids, c.metrics.layer_runs) for c in done])
    assert found[0] == found[1]


def test_rows_that_see_nothing_are_finite_and_the_kernel_refuses_the_mask():
    q = jax.random.normal(jax.random.key(0), (1, 2, 4, 8))
    keys = jax.random.normal(jax.random.key(1), (1, 2, 16, 8))
    given = dict(start=jnp.asarray([3]), prefix=jnp.asarray([3]), tail=None)
    none = jnp.zeros((1, 16), bool)
    assert np.isfinite(api.tree_attention(q, keys, keys, **given, valid=none)).all()
    every = api.tree_attention(q, keys, keys, **given, valid=~none)
    np.testing.assert_array_equal(every, api.tree_attention(q, keys, keys, **given))
    one = api.tree_attention(q, keys, keys, **given, valid=none.at[0, 2].set(True))
    np.testing.assert_allclose(one[0, :, 0], jnp.stack([keys[0, 0, 2]] * 2), rtol=1e-6)
    with pytest.raises(SpecjaxError, match="tokens skip layers"):
        api.tree_attention(q, keys, keys, **given, valid=none, backend="mosaic")


def test_robust_routers_do_not_see_scale_and_offset():
    x = jax.random.normal(jax.random.key(3), (256, 32))
    for bits in (4, 8):
        robust, plain = models.router(0, bits), models.router(0)
        for scale, offset in ((3.7, 0.0), (0.21, 5.0), (11.0, -40.0)):
            moved = scale * x + offset
            # A value at a rounding boundary may fall on either side in float32.
            differ = routing.codes(x, bits) != routing.codes(moved, bits)
            assert np.mean(differ) < 1e-2
            same = ~np.any(differ, axis=-1)
            np.testing.assert_array_equal(robust.executes(x)[same], robust.executes(moved)[same])
            if bits == 4:
                np.testing.assert_array_equal(robust.executes(x), robust.executes(moved))
        decisions = np.asarray(robust.executes(x))
        assert 0 < decisions.mean() < 1
        assert (np.asarray(plain.executes(x)) != np.asarray(plain.executes(11.0 * x - 40.0))).any()


def dots(jaxpr, inside: bool = False) -> tuple[int, int]:
    """Matrix products outside of conditionals with an empty branch, and within them."""
    count = [0, 0]
    for equation in jaxpr.eqns:
        count[inside] += equation.primitive.name == "dot_general"
        branches = equation.params.get("branches", ())
        within = inside or any(not branch.eqns for branch in branches)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                found = dots(getattr(value, "jaxpr", value), within)
                count = [count[0] + found[0], count[1] + found[1]]
    return count[0], count[1]


def _is_jaxpr(value) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def decode_jaxpr(target, drafter):
    state = decoding.init_state(target, drafter, 1, 48, 8)
    program = lambda target, drafter, state: decoding.decode(
        *(target, drafter, state, jnp.asarray([-1]), jnp.int32(4)),
        *(sample.sampling(), verify.Greedy()),
    )
    return jax.make_jaxpr(program)(target, drafter, state).jaxpr


def test_products_of_routed_layers_stand_in_conditionals():
    full = prepare(tiny.model(models.CONFIG))
    routed = models.with_depth(full)
    outside, inside = dots(decode_jaxpr(full, NoDraft()))
    assert inside == 0
    linear = 2  # one product per platform
    per_layer = (outside - linear) // models.CONFIG.num_layers
    assert outside == per_layer * models.CONFIG.num_layers + linear, "the layers and the head"
    always, routers = models.DEPTH.start_layer, len(routed.depth.routers)
    assert dots(decode_jaxpr(routed, NoDraft())) == (
        per_layer * always + 2 * linear * routers + linear,
        per_layer * routers,
    )


def test_layers_nobody_votes_for_do_not_run():
    target = models.routed(bias=-1000.0)
    done = tiny.run(tiny.engine(target, NoDraft()), tiny.requests([PROMPTS[0]], 9))
    assert done[0].metrics.layer_runs == (8, 0, 0, 0)
    assert done[0].metrics.executed_fraction == 0.25


def full_and_routed():
    """Abstract models of `test_memory`'s shape."""

    def make(depth: bool):
        model = prepare(llama.build(tiny.ZeroCheckpoint(memory.CONFIG), jnp.float32))
        return models.with_depth(model) if depth else model

    return tuple(jax.eval_shape(lambda depth=depth: make(depth)) for depth in (False, True))


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        pytest.param("none", 1, marks=pytest.mark.slow),
        ("eagle-12", 1),
        pytest.param("none", 4, marks=pytest.mark.slow),
    ],
)
def test_memory_conditionals_move_no_cache(name, batch):
    found = {}
    for target in full_and_routed():
        drafter = memory.drafter(name, target)
        state, compiled = memory.abstract(drafter, target, batch)
        sizes, hlo = compiled.memory_analysis(), compiled.as_text()
        caches = state.cache.keys, state.cache.values
        assert sizes.alias_size_in_bytes >= memory.num_bytes(caches)
        assert not memory.cache_moves(hlo, caches[0][0].shape)
        found[target.depth is not None] = sizes.temp_size_in_bytes
        conditionals = [line for line in memory.inside_loops(hlo) if " conditional(" in line]
        routed = 0 if target.depth is None else len(target.depth.routers)
        assert len(conditionals) == routed
    layer = memory.num_bytes(caches) / memory.CONFIG.num_layers
    print(f"{name}, batch {batch}: temporaries {found}, {layer=:.0f}")
    assert found[True] - found[False] < 0.1 * layer


def test_bad_input():
    model = tiny.model(models.CONFIG)
    with pytest.raises(ConfigError, match="both or neither"):
        llama.Llama(dataclasses.replace(model.config, depth=DepthConfig()), model.model)
    with pytest.raises(ConfigError, match="needs a predictor"):
        models.routed(selection=models.Selection(mode="vote"))
    with pytest.raises(ConfigError, match="no use for a predictor"):
        models.routed(predictor=models.predictor())
    with pytest.raises(ConfigError, match="survivors=0"):
        models.Selection(mode="prune", survivors=0)
    with pytest.raises(ConfigError, match="supported are off, vote, prune"):
        models.Selection(mode="prunes")
    block = layers.causal_block(jnp.zeros((1, 1), jnp.int32), jnp.zeros((1,), jnp.int32))
    assert block.valid is None
