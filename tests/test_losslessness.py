"""Greedy output does not depend on the drafter: every drafter, batches of one and four, refilled slots.

The reference is not the decoding loop but whole passes over the text. Settings are those of the project's definition of
right: float32, highest matmul precision; at a first difference both prefixes are scored in one pass, and it is a tie
only if the target's two best logits lie within 1e-3 there.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.checkpoints import heads
from specjax.decoding import target as target_pass
from specjax.decoding import tree as trees
from specjax.decoding.tree import Tree
from specjax.drafters.eagle import eagle
from specjax.drafters.hierarchical import Hierarchical
from specjax.drafters.lm import LM
from specjax.drafters.medusa import medusa
from specjax.drafters.merge import merge
from specjax.drafters.ngram import Ngram
from specjax.drafters.none import NoDraft
from specjax.drafters.self_draft import SelfDraft
from specjax.drafters.suffix import Suffix
from specjax.engine.engine import Programs
from specjax.models import cache as kv
from tests import paths, planned, ties, tiny

MIN, MIDDLE, MAX = "min", "middle", "max"
ALL = {MIN, MIDDLE, MAX}
PROGRAMS = Programs()
COMPARISONS = ties.Comparisons()


@pytest.fixture(autouse=True)
def hurry(request):
    """The slow products compile as users do; the fast cover does not wait for the optimizer."""
    if request.node.get_closest_marker("slow") or "exact" in request.node.name:
        yield
        return
    with tiny.hurried_compiler():
        yield


@functools.cache
def noisy(scale: float):
    return tiny.noisy(tiny.fixture_model(), scale)


def medusa_drafter():
    loaded, named = heads.load_medusa(paths.fixture("medusa-tiny"), tiny.fixture_model())
    return medusa(loaded, min(named.values(), key=len))


def plan(shape, *accepted: int) -> Callable:
    return lambda: planned.planned(tiny.greedy_texts(), accepted, shape)


# name -> (target, how it is loaded, drafter, acceptances that must occur in the batch of four)
TINY = ("tiny-fp16", "auto")
CODES = ("tiny-gptq-g128", "never")
CASES: dict[str, tuple] = {
    "none": (*TINY, NoDraft, {MIN}),
    "ngram": (*TINY, lambda: Ngram(draft_depth=3, ngram_max=3, ngram_min=1), ALL),
    "lm-same": (*TINY, lambda: LM(model=tiny.fixture_model(), draft_depth=3), {MAX}),
    "lm-noisy": (*TINY, lambda: LM(model=noisy(0.25), draft_depth=3), ALL),
    "lm-other": (*TINY, lambda: LM(model=noisy(9.0), draft_depth=3), {MIN}),
    "self": (*TINY, lambda: SelfDraft(draft_depth=3), {MAX}),
    "eagle-d2k4n8": (*TINY, lambda: eagle(tiny.fixture_head(), 2, 4, 8), ALL),
    "eagle-d6k10n60": (*TINY, lambda: eagle(tiny.fixture_head(), 6, 10, 60), {MIN, MIDDLE}),
    "eagle-d5k1n6": (*TINY, lambda: eagle(tiny.fixture_head(), 5, 1, 6), {MIN, MIDDLE}),
    "medusa": (*TINY, medusa_drafter, {MIN}),
    "hierarchical": (
        *TINY,
        lambda: Hierarchical(
            model=noisy(0.25), inner=eagle(tiny.fixture_head(), 2, 4, 8), min_draft_depth=3
        ),
        {MIN, MIDDLE},
    ),
    "suffix": (
        *TINY,
        lambda: Suffix(texts=jnp.zeros(0, jnp.int32), draft_depth=3, num_tree_nodes=7, shortest=1),
        {MIN, MIDDLE},
    ),
    "merge": (
        *TINY,
        lambda: merge(
            [eagle(tiny.fixture_head(), 2, 4, 8), Ngram(draft_depth=3, ngram_min=1)],
            num_nodes=9,
        ),
        {MIN, MIDDLE},
    ),
    "oracle": (*TINY, plan(planned.CHAIN, 4), {MAX}),
    "adversary": (*TINY, plan(planned.CHAIN, 0), {MIN}),
    "planned": (*TINY, plan(planned.CHAIN, 2, 0, 4, 1, 3), ALL),
    "planned-tree": (*TINY, plan(planned.TREE, 1, 3, 0, 2), ALL),
    "oracle-tree": (*TINY, plan(planned.TREE, 3), {MAX}),
    "codes-none": (*CODES, NoDraft, {MIN}),
    "codes-self-w4a8": (*CODES, lambda: SelfDraft(draft_depth=3, scheme="w4a8"), {MAX}),
    "eagle3": (
        "tiny8-fp16",
        "auto",
        lambda: eagle(tiny.fixture_head("eagle3-tiny", "tiny8-fp16"), 3, 4, 12),
        {MIN, MIDDLE},
    ),
}
PRODUCT = [(name, batch) for name in CASES for batch in (1, 4)]
# The fast cover: everything in batches, where refilling happens; alone what has a path of its own there.
FAST = {(name, 4) for name in CASES}
FAST -= {
    (name, 4)
    for name in ("eagle-d6k10n60", "eagle-d5k1n6", "eagle3", "codes-none", "lm-other", "lm-same")
}
FAST |= {(name, 1) for name in ("ngram", "planned-tree")}


def occurred(histogram: np.ndarray) -> set[str]:
    """Which of minimum, middle and maximum acceptance a histogram has."""
    found = {MIN} if histogram[0] else set()
    found |= {MIDDLE} if histogram[1:-1].any() else set()
    return found | ({MAX} if histogram[-1] else set())


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        pytest.param(
            *case, marks=() if case in FAST else pytest.mark.slow, id="{}-{}".format(*case)
        )
        for case in PRODUCT
    ],
)
def test_greedy_output_is_the_targets(name, batch):
    checkpoint, policy, build, must_occur = CASES[name]
    target = tiny.fixture_model(checkpoint, policy)
    prompts, texts = tiny.prompts(), tiny.greedy_texts(checkpoint, policy)
    jobs = tiny.requests(prompts, tiny.NEW_TOKENS)
    jobs = jobs if batch > 1 else [jobs[2], jobs[4], jobs[5]]
    done = tiny.run(tiny.engine(target, build(), PROGRAMS), jobs, batch)
    for completion in done:
        index = completion.request.request_id
        begin = len(prompts[index])
        expected = texts[index][begin : begin + tiny.NEW_TOKENS[index]]
        COMPARISONS.compare(target, prompts[index], completion.output_ids, expected)
    histogram = tiny.histogram(done)
    print(f"{name}, batch {batch}: steps by accepted drafts {histogram.tolist()}")
    if batch == 4:
        assert must_occur <= occurred(histogram)
    for completion in done:
        check_plan(name, completion.metrics.acceptance_histogram)


def check_plan(name: str, histogram) -> None:
    """A request of a planned drafter accepts as planned: so many steps of each length, from the first on."""
    build = CASES[name][2]
    drafter = build() if name.startswith(("planned", "oracle", "adversary")) else None
    if drafter is not None:
        steps = np.arange(sum(histogram)) % len(drafter.plan)
        expected = np.bincount(np.asarray(drafter.plan)[steps], minlength=len(histogram))
        assert list(histogram) == expected.tolist()


def test_ties_are_rare():
    COMPARISONS.check_rare()


# Largest distance from the likeliest token's logit, scored in one pass: rounding of sums in another order.
ROUNDING = {"bfloat16": 0.15, "float16": 0.02}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", ["none", "ngram", "eagle"])
def test_rounded_dtypes_emit_the_targets_choice_up_to_rounding(name, dtype):
    """Bitwise equality is no theorem in 16 bits: each token is the argmax after its prefix, or nearly so."""
    target = tiny.fixture_model(dtype=dtype)
    head = tiny.fixture_head(dtype=dtype)
    drafter = {"none": NoDraft(), "ngram": Ngram(ngram_min=1), "eagle": eagle(head, 2, 4, 8)}[name]
    prompts = tiny.prompts()
    done = tiny.run(tiny.engine(target, drafter, PROGRAMS), tiny.requests(prompts, 24), 4)
    gaps = []
    for prompt, completion in zip(prompts, done, strict=True):
        text = prompt + completion.output_ids
        logits = tiny.full_logits(target, text)[len(prompt) - 1 : -1]
        gaps.append(logits.max(-1) - logits[np.arange(len(logits)), completion.output_ids])
    gaps = np.concatenate(gaps)
    print(
        f"{name}, {dtype}: largest gap {gaps.max():.3g}, {np.count_nonzero(gaps)} of {gaps.size} not 0"
    )
    assert gaps.max() <= ROUNDING[dtype]


CHAIN_ROWS = 5


@functools.cache
def after_prompts():
    """The first two prompts in a cache, and their lengths."""
    target, prompts = tiny.fixture_model(), tiny.prompts()[:2]
    tokens = np.zeros((2, 24), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    cache = kv.init(target.config, 2, 48, target.dtype)
    chunk = jax.jit(lambda m, t, s, c: target_pass.forward_chunk(m, t, s, c, None)[0].cache)
    cache = chunk(target, jnp.asarray(tokens), jnp.zeros((2,), jnp.int32), cache)
    return cache, jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)


@jax.jit
def forward(target, tree, cache, lengths):
    logits, _, cache, _ = target_pass.forward_tree(target, tree, cache, lengths, None)
    return logits, cache


def test_exact_plain_decoding_with_padded_rows_gives_the_chains_logits():
    """With the row count of the chain's pass, decoding one token at a time gives the same bits."""
    target = tiny.fixture_model()
    cache, lengths = after_prompts()
    drafts = np.random.default_rng(0).integers(0, 1024, (2, CHAIN_ROWS)).astype(np.int32)
    chain = trees.chain(jnp.asarray(drafts[:, 0]), jnp.asarray(drafts[:, 1:]))
    together, _ = forward(target, chain, cache, lengths)
    padding = jnp.zeros((2, CHAIN_ROWS - 1), jnp.int32)
    for row in range(CHAIN_ROWS):
        root = jnp.asarray(drafts[:, row])
        alone = trees.chain(root, padding, jnp.zeros((2,), jnp.int32))
        logits, cache = forward(target, alone, cache, lengths + row)
        assert (np.asarray(logits[:, 0]) == np.asarray(together[:, row])).all(), row


def test_exact_logits_of_a_path_do_not_depend_on_the_rest_of_the_tree():
    target = tiny.fixture_model()
    cache, lengths = after_prompts()
    rng = np.random.default_rng(1)
    parents, path = planned.TREE
    tokens = rng.integers(0, 1024, (2, len(parents))).astype(np.int32)
    other = rng.integers(0, 1024, tokens.shape).astype(np.int32)
    other[:, list(path)] = tokens[:, list(path)]
    found = []
    for nodes in (tokens, other):
        tree = Tree(
            tokens=jnp.asarray(nodes),
            parents=jnp.broadcast_to(jnp.asarray(parents, jnp.int32), nodes.shape),
            max_depth=3,
        )
        found.append(np.asarray(forward(target, tree, cache, lengths)[0]))
    assert (found[0][:, list(path)] == found[1][:, list(path)]).all()
    assert (found[0] != found[1]).any()
