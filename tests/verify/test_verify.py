"""Acceptance rules: the greedy walk against numpy, and the distribution that rejection sampling leaves."""

import functools
from dataclasses import dataclass, replace

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import verify
from specjax.decoding import sampling as sample
from specjax.decoding.tree import Tree
from specjax.drafters import common_vocabulary
from specjax.drafters.base import Chunk
from specjax.drafters.eagle import eagle
from specjax.drafters.hierarchical import Hierarchical
from specjax.drafters.lm import LM
from specjax.drafters.self_draft import SelfDraft
from specjax.engine import decode as decoding
from specjax.errors import ConfigError
from specjax.models import llama
from specjax.verify import base
from tests import distributions, planned, strategies, tiny
from tests.strategies import SETTINGS

VOCAB = 8
DRAWS = 20_000
NEW_TOKENS = 3


def keys_for(batch: int):
    return sample.request_keys(0, np.arange(batch))


@jax.jit
def greedy(tree: Tree, logits):
    return verify.Greedy()(tree, None, logits, keys_for(tree.tokens.shape[0]), sample.sampling())


def walk(tokens, parents, best) -> tuple[list[int], list[int]]:
    """Path and new tokens of the deepest node all of whose path is the target's choice, one node at a time."""
    accepted, depth = {0: [0]}, 0
    for node in range(1, len(tokens)):
        parent = parents[node]
        if parent in accepted and tokens[node] == best[parent]:
            accepted[node] = [*accepted[parent], node]
            depth = max(depth, len(accepted[node]) - 1)
    path = next(line for line in accepted.values() if len(line) == depth + 1)
    return path, [*(int(tokens[n]) for n in path[1:]), int(best[path[-1]])]


@SETTINGS
@hypothesis.given(strategies.forests(), strategies.seeds())
def test_greedy_is_the_numpy_walk(parents, seed):
    """Few tokens, so that paths of all lengths and equal siblings occur."""
    rng = np.random.default_rng(seed)
    batch, count = parents.shape
    tokens = rng.integers(0, 2, (batch, count)).astype(np.int32)
    logits = rng.standard_normal((batch, count, 2)).astype(np.float32)
    tree = Tree(tokens=jnp.asarray(tokens), parents=jnp.asarray(parents), max_depth=count - 1)
    found = jax.tree.map(np.asarray, greedy(tree, jnp.asarray(logits)))
    for b in range(batch):
        path, new = walk(tokens[b], parents[b], logits[b].argmax(-1))
        assert found.length[b] == len(path)
        assert found.path[b, : len(path)].tolist() == path
        assert found.tokens[b, : len(path)].tolist() == new
        assert found.next_token[b] == new[-1]


# --- Distributions -------------------------------------------------------------------------------------------------

TARGET_CONFIG = tiny.config(vocab_size=VOCAB, num_layers=1)
FIRST, SECOND = [1, 5, 2, 7, 3], [4, 0]
BATCHES = {1: [FIRST], 4: [FIRST, SECOND, FIRST, FIRST]}
WIDTH = len(FIRST)
CHUNKS = 4  # calls among which the draws are divided
TREE = (-1, 0, 0, 1, 1, 2)  # siblings at both levels
# Draft models with fewer and more tokens than the target.
PADDED = {
    "narrow": VOCAB - 2,
    "wide": VOCAB + 3,
    "inner-narrow": VOCAB - 2,
    "inner-wide": VOCAB + 3,
}
FILTERS = {"off": {"temperature": 1.3}, "on": {"temperature": 0.9, "top_k": 5, "top_p": 0.85}}


@functools.cache
def target():
    return tiny.model(TARGET_CONFIG, seed=3)


@functools.cache
def drafter(name: str):
    if name == "chain":
        return LM(model=tiny.model(TARGET_CONFIG, seed=9), draft_depth=2)
    if name == "self":
        return SelfDraft(draft_depth=2)
    if name in PADDED:
        other = tiny.model(tiny.config(vocab_size=PADDED[name], num_layers=1), seed=9)
        common_vocabulary.clip(other)
        draft = LM(model=other, draft_depth=2)
        if name.startswith("inner"):
            draft = Hierarchical(model=target(), inner=draft, min_draft_depth=2)
        return draft.fitted(VOCAB)
    if name == "tree":
        table = 1.5 * np.random.default_rng(4).standard_normal((VOCAB, VOCAB))
        return planned.Bigram(table=jnp.asarray(table, jnp.float32), parents=TREE, depth=2)
    if name == "eagle":
        return eagle(tiny.head(TARGET_CONFIG), draft_depth=2, topk=2, num_nodes=6)
    return tiny.DRAFTERS[name](tiny.Parts(target()))


# Compiling takes longer than running here, so the compiler is told to hurry.
HURRY = {"xla_backend_optimization_level": 0}


@functools.partial(jax.jit, static_argnames="acceptor", compiler_options=HURRY)
def generate(model, drafter, request_ids, sampling, acceptor):
    """New tokens [X, B, 3] of X batches, through the prefill and the decoding loop that generation uses."""
    prompts = BATCHES[request_ids.shape[1]]
    batch = len(prompts)
    tokens = np.zeros((batch, WIDTH + 1), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)
    stop_ids = jnp.asarray([-1], jnp.int32)

    def one(keys):
        capacity = WIDTH + NEW_TOKENS + drafter.max_depth + 1 + drafter.scratch
        state = decoding.init_state(model, drafter, batch, capacity, NEW_TOKENS)
        state = replace(state, keys=keys, limit=jnp.full((batch,), NEW_TOKENS, jnp.int32))
        chunk = Chunk(
            tokens=jnp.asarray(tokens[:, :-1]),
            next_tokens=jnp.asarray(tokens[:, 1:]),
            start=jnp.zeros((batch,), jnp.int32),
            valid=lengths,
            features=None,
        )
        state = decoding.prefill_chunk(model, drafter, state, chunk, lengths, stop_ids, sampling)
        steps = jnp.int32(NEW_TOKENS)
        state = decoding.decode(model, drafter, state, stop_ids, steps, sampling, acceptor)
        return state.tokens[:, :NEW_TOKENS]

    keys = sample.request_keys(11, request_ids.reshape(-1)).reshape(*request_ids.shape, 2)
    return jax.vmap(one)(keys)


def counts(name: str, filters: str, batch: int, acceptor) -> list[np.ndarray]:
    """How often each triple of tokens came first, [V, V, V] for each of the prompts in the batch."""
    prompts = BATCHES[batch]
    result = [np.zeros(VOCAB**NEW_TOKENS, np.int64) for _ in range(1 if batch == 1 else 2)]
    groups = -(-DRAWS // prompts.count(FIRST) // CHUNKS) * CHUNKS
    sampling = sample.sampling(**FILTERS[filters])
    for ids in np.arange(groups * batch, dtype=np.uint32).reshape(CHUNKS, -1, batch):
        tokens = generate(target(), drafter(name), jnp.asarray(ids), sampling, acceptor)
        index = np.asarray(tokens) @ [VOCAB**2, VOCAB, 1]
        for row, prompt in zip(index.T, prompts, strict=True):
            result[prompt != FIRST] += np.bincount(row, minlength=VOCAB**NEW_TOKENS)
    return [table.reshape(VOCAB, VOCAB, VOCAB) for table in result]


@functools.cache
def expected(filters: str, is_first: bool) -> np.ndarray:
    """The joint distribution of the first three tokens [V, V, V], by scoring every text of two tokens."""
    prompt = FIRST if is_first else SECOND
    pairs = np.stack(np.meshgrid(np.arange(VOCAB), np.arange(VOCAB), indexing="ij"), -1)
    prefix = np.broadcast_to(prompt, (VOCAB**2, len(prompt)))
    texts = np.concatenate([prefix, pairs.reshape(-1, 2)], axis=1)
    logits = np.asarray(jax.jit(llama.full_logits)(target(), jnp.asarray(texts, jnp.int32)))
    rows = logits[:, -NEW_TOKENS:].reshape(-1, VOCAB)
    p = np.stack([distributions.probabilities(row, **FILTERS[filters]) for row in rows])
    p = p.reshape(VOCAB, VOCAB, NEW_TOKENS, VOCAB)
    return p[0, 0, 0][:, None, None] * p[:, 0, 1][..., None] * p[:, :, 2]


def p_values(name: str, filters: str, batch: int, acceptor) -> list[float]:
    """One for the first prompt, and one for the second where the batch has it."""
    found = counts(name, filters, batch, acceptor)
    assert found[0].sum() >= DRAWS
    return [
        distributions.p_value(table, expected(filters, index == 0))
        for index, table in enumerate(found)
    ]


FAST = [
    ("narrow", "off", 1),
    ("chain", "off", 1),
    ("chain", "on", 4),
    ("tree", "on", 1),
    ("head", "off", 4),
]
SLOW = [
    (name, filters, batch)
    for name in ("chain", "tree", *PADDED, *tiny.DRAFTERS)
    for filters in FILTERS
    for batch in (1, 4)
    if (name, filters, batch) not in FAST
]


@pytest.mark.parametrize(
    ("name", "filters", "batch"),
    FAST + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW],
)
def test_sampling_keeps_the_targets_distribution(name, filters, batch):
    values = p_values(name, filters, batch, verify.Rejection())
    print(f"{name}, filters {filters}, batch {batch}: p =", [f"{p:.3g}" for p in values])
    assert min(values) > distributions.SIGNIFICANCE


@dataclass(frozen=True)
class MatchesArgmax:
    """Wrong: keeps what the target finds likeliest, as if decoding were greedy, and samples the bonus token."""

    def __call__(self, tree, q, logits, keys, sampling):
        kept = verify.Greedy()(tree, None, logits, keys, sampling)
        node = jnp.take_along_axis(kept.path, kept.length[:, None] - 1, axis=1)
        last = jnp.take_along_axis(logits, node[..., None], axis=1)[:, 0]
        return base.verified(tree, kept.path, kept.length, sample.choose(keys, last, sampling))


@dataclass(frozen=True)
class ForgetsTheResidual:
    """Wrong: after a rejection in a chain it draws from the target's distribution, draft mass included."""

    def __call__(self, tree, q, logits, keys, sampling):
        kept = verify.Rejection()(tree, q, logits, keys, sampling)
        node = jnp.take_along_axis(kept.path, kept.length[:, None] - 1, axis=1)
        last = jnp.take_along_axis(logits, node[..., None], axis=1)[:, 0]
        bonus = sample.choose(sample.fold(keys, 9), last, sampling)
        return base.verified(tree, kept.path, kept.length, bonus)


@dataclass(frozen=True)
class MisreadsQ:
    """Wrong: takes the draft distribution for flatter than it was."""

    def __call__(self, tree, q, logits, keys, sampling):
        flat = jnp.sqrt(q)
        flat = flat / jnp.maximum(jnp.sum(flat, axis=-1, keepdims=True), 1e-9)
        return verify.Rejection()(tree, flat, logits, keys, sampling)


@pytest.mark.parametrize(
    ("name", "acceptor"),
    [
        ("tree", MatchesArgmax()),
        ("chain", ForgetsTheResidual()),
        pytest.param("tree", MisreadsQ(), marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_wrong_acceptors_fail_the_same_test(name, acceptor):
    values = p_values(name, "off", 1, acceptor)
    print(f"{name}: p =", values)
    assert max(values) < distributions.SIGNIFICANCE


@pytest.mark.parametrize(
    ("name", "is_greedy", "match"),
    [
        ("typo", True, "acceptance='typo'"),
        ("greedy", False, "needs temperature=0"),
        ("rejection", True, "needs temperature > 0"),
        ("typical", True, "needs temperature > 0"),
        ("relaxed", False, "at temperature 0 only"),
    ],
)
def test_unfit_acceptors_are_refused(name, is_greedy, match):
    with pytest.raises(ConfigError, match=match):
        verify.acceptor(name, is_greedy)


def test_lossless_takes_the_lossless_rule():
    assert verify.acceptor("lossless", True) == verify.Greedy()
    assert verify.acceptor("lossless", False) == verify.Rejection()
