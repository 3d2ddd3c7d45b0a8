"""Llama and EAGLE heads against the float64 oracle; blocks, trees and chunks against plain text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.config import RopeConfig
from specjax.decoding import target as target_pass
from specjax.decoding import tree as trees
from specjax.decoding.tree import Tree
from specjax.models import cache as kv
from specjax.models import eagle, layers, llama
from specjax.models.prepare import prepare
from specjax.quant.dense_linear import Linear
from tests import strategies, tiny
from tests.oracle import Oracle

LLAMA3 = RopeConfig(
    theta=10000.0,
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)

CONFIGS = {
    "gqa1-untied": dict(num_kv_heads=4),
    "gqa2-tied": dict(tie_word_embeddings=True),
    "gqa3-head_dim": dict(num_heads=6, num_kv_heads=2, head_dim=10),
    "qkv_bias": dict(qkv_bias=True, architecture="Qwen2ForCausalLM"),
    "all-biases-llama3": dict(qkv_bias=True, o_bias=True, mlp_bias=True, rope=LLAMA3),
    "linear-rope-one-layer": dict(num_layers=1, rope=RopeConfig(kind="linear", factor=4.0)),
}


def built(name: str):
    """A random model, prepared, with the oracle of the same parameters."""
    checkpoint = tiny.RandomCheckpoint(tiny.config(**CONFIGS[name]), seed=7)
    module = llama.build(checkpoint, jnp.float32)
    return module, Oracle(checkpoint.params, checkpoint.config)


@pytest.mark.parametrize("name", CONFIGS)
def test_full_logits_are_the_oracles(name):
    module, oracle = built(name)
    tokens = np.random.default_rng(0).integers(0, 16, (2, 40)).astype(np.int32)
    expected = np.stack([oracle.llama(row)[0] for row in tokens])
    found = np.asarray(jax.jit(llama.full_logits)(module, jnp.asarray(tokens)))
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 2e-5 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("name", ["gqa2-tied", "all-biases-llama3"])
def test_prepared_model_computes_the_same(name):
    module, oracle = built(name)
    tokens = np.random.default_rng(1).integers(0, 16, (1, 24)).astype(np.int32)
    found = jax.jit(llama.full_logits)(prepare(module), jnp.asarray(tokens))
    expected = oracle.llama(tokens[0])[0]
    assert np.abs(np.asarray(found)[0] - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("bias", [False, True])
def test_eagle_head_is_the_oracles(bias):
    target = tiny.model()
    checkpoint = tiny.RandomCheckpoint(tiny.config(), 1, ("fc.bias",) if bias else ())
    head = eagle.build(checkpoint, jnp.float32)
    rng = np.random.default_rng(2)
    features = rng.standard_normal((2, 12, 32)).astype(np.float32)
    tokens = rng.integers(0, 16, (2, 12)).astype(np.int32)
    block = layers.causal_block(jnp.asarray(tokens), jnp.zeros((2,), jnp.int32))
    cache = kv.init(head.config, 2, 12, jnp.float32, num_layers=1)
    found, _ = jax.jit(lambda *a: head(*a, target))(jnp.asarray(features), block, cache)
    oracle = Oracle(checkpoint.params, checkpoint.config)
    table = np.asarray(target.model.embed_tokens.weight[...])
    assert ("fc.bias" in checkpoint.params) == bias
    for b in range(2):
        expected = oracle.eagle(features[b], tokens[b], table)
        assert np.abs(np.asarray(found[b]) - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("bias", [False, True])
def test_linears_work_at_the_row_counts_around_tiles(bias):
    rng = np.random.default_rng(8)
    weight = rng.standard_normal((24, 40)).astype(np.float32)
    offset = rng.standard_normal(24).astype(np.float32) if bias else None
    linear = Linear(jnp.asarray(weight), jnp.asarray(offset) if bias else None)
    call = jax.jit(lambda x: linear(x))
    for rows in strategies.ROW_COUNTS:
        x = rng.standard_normal((rows, 40)).astype(np.float32)
        expected = x.astype(np.float64) @ weight.T.astype(np.float64) + (offset if bias else 0)
        found = np.asarray(call(jnp.asarray(x)))
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


PROMPT = np.random.default_rng(3).integers(0, 16, (2, 21)).astype(np.int32)
LENGTHS = np.asarray([21, 13], np.int32)
PARENTS = np.asarray([[-1, 0, 0, 1, 1, 2, 3, 5, 5], [-1, 0, 1, 0, -1, 3, 3, 2, 7]], np.int32)


forward_chunk = jax.jit(target_pass.forward_chunk, static_argnames="needs")
forward_tree = jax.jit(target_pass.forward_tree, static_argnames="needs")


def prefilled(module, width: int, capacity: int = 64):
    """A cache that holds `PROMPT`, taken in by chunks of `width`, and the hidden rows."""
    cache = kv.init(module.config, 2, capacity, module.dtype)
    rows = []
    for begin in range(0, PROMPT.shape[1], width):
        tokens = jnp.asarray(PROMPT[:, begin : begin + width])
        start = jnp.full((2,), begin, jnp.int32)
        out, features = forward_chunk(module, tokens, start, cache, needs="final")
        cache = out.cache
        rows.append(np.asarray(features))
    return cache, np.concatenate(rows, axis=1)


def test_chunked_prefill_is_one_pass():
    module, _ = built("gqa2-tied")
    whole, rows = prefilled(module, PROMPT.shape[1])
    pieces, found = prefilled(module, 7)
    assert np.abs(found - rows).max() < 1e-5
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        assert np.abs(np.asarray(a - b)).max() < 1e-5


@pytest.mark.parametrize("name", ["gqa3-head_dim", "gqa2-tied"])
def test_every_path_of_a_tree_is_a_text(name):
    """Logits and captured features of a node are those of the prompt followed by its path."""
    module, oracle = built(name)
    cache, _ = prefilled(module, 21)
    tokens = np.random.default_rng(4).integers(0, 16, PARENTS.shape).astype(np.int32)
    tree = Tree(tokens=jnp.asarray(tokens), parents=jnp.asarray(PARENTS), max_depth=4)
    lengths = jnp.asarray(LENGTHS)
    logits, features, cache, sent = forward_tree(module, tree, cache, lengths, needs="final")
    assert (sent.parents == tree.parents).all()
    mask = np.asarray(trees.ancestor_mask(tree))
    for b, n in np.ndindex(*PARENTS.shape):
        if n and PARENTS[b, n] < 0:
            continue
        text = [*PROMPT[b, : LENGTHS[b]], *tokens[b, np.flatnonzero(mask[b, n])]]
        expected, hidden = oracle.llama(text)
        assert np.abs(np.asarray(logits[b, n]) - expected[-1]).max() < 1e-4
        assert np.abs(np.asarray(features[b, n]) - hidden[-1]).max() < 1e-4


def test_a_chain_is_the_tree_with_chain_parents():
    module, _ = built("gqa2-tied")
    cache, _ = prefilled(module, 21)
    drafts = jnp.asarray(np.random.default_rng(5).integers(0, 16, (2, 4)), jnp.int32)
    root = jnp.asarray([3, 4], jnp.int32)
    chain = trees.chain(root, drafts, jnp.asarray([4, 2], jnp.int32))
    general = Tree(tokens=chain.tokens, parents=chain.parents, max_depth=4)
    lengths = jnp.asarray(LENGTHS)
    one = forward_tree(module, chain, cache, lengths, needs=(0, 1))
    other = forward_tree(module, general, cache, lengths, needs=(0, 1))
    used = np.asarray(trees.used(chain))
    for found, expected in zip(one[:2], other[:2], strict=True):
        assert np.abs(np.asarray(found - expected))[used].max() < 1e-5
    assert one[1].shape == (2, 5, 2 * 32)


def test_named_layers_are_captured_at_their_input():
    """What a head asks for by layer is the residual stream entering it; layer 0's is the embedding."""
    module, _ = built("gqa2-tied")
    tokens = jnp.asarray(PROMPT)
    cache = kv.init(module.config, 2, 64, module.dtype)
    start = jnp.zeros((2,), jnp.int32)
    _, features = forward_chunk(module, tokens, start, cache, needs=(1, 0))
    embedded = module.model.embed_tokens(tokens)
    assert (features[..., 32:] == embedded).all()
    assert not (features[..., :32] == embedded).any(axis=-1).all()
