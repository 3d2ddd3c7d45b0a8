"""Greedy output of trained heads is that of plain decoding: Llama and Qwen3 targets, dense and quantized.

Fast tests: random heads with quantized targets are in the tables of `tiny`, trained ones with dense targets in
`test_head_goldens`.
"""

import dataclasses
import functools
import itertools

import jax.numpy as jnp
import pytest

from specjax import checkpoints
from specjax.drafters import head as heads
from specjax.engine.engine import Programs
from specjax.models import llama
from specjax.models.prepare import prepare
from specjax.quantize import quantize, recipe
from tests import head_fixtures, ties, tiny

_TREE = {"draft_depth": 3, "topk": 3, "num_nodes": 9}
# Name -> a head, and its options. Heads of one family fit the other's target too, where they accept little.
DRAFTERS = {
    "eagle3-chain": ("eagle3-nbr-qwen3", {"tree": "chain", "draft_depth": 4}),
    "eagle31-chain": ("eagle31-llama", {"tree": "chain", "draft_depth": 4}),
    "eagle3-topk": ("eagle3-deepspec-qwen3", _TREE),
    "eagle3-normfc-topk": ("eagle3-normfc-llama", _TREE),
    "peagle-chain": ("peagle-qwen3", {"tree": "chain", "draft_depth": 4}),
    "peagle-best-first": ("peagle-qwen3", {"tree": "best-first", "draft_depth": 4, "num_nodes": 9}),
    "peagle-window": ("peagle-qwen3", {"tree": "chain", "draft_depth": 4, "window": 6}),
    "mtp-chain": ("mtp-qwen3", {"tree": "chain", "draft_depth": 3}),
    "mtp-topk": ("mtp-qwen3", _TREE),
}
SCHEMES = {"dense": None, "w4a16": 32, "w8a8": None, "w4a8": 32}
FAMILIES = ("llama", "qwen3")
PRODUCT = list(itertools.product(DRAFTERS, FAMILIES, SCHEMES, (1, 4)))
NEW_TOKENS = (30, 17, 24, 30, 21, 9)
COMPARISONS = ties.Comparisons()


@pytest.fixture(autouse=True)
def hurry(hurried):
    """Programs are many and run briefly."""


@functools.cache
def target(family: str, scheme: str):
    """A loaded target of 8 layers, rounded to a scheme."""
    loaded = head_fixtures.target(f"tiny8-{family}")
    if scheme == "dense":
        return loaded
    checkpoint = checkpoints.open_checkpoint(head_fixtures.folder(f"tiny8-{family}"))
    chosen = recipe.make(scheme, "rtn", group_size=SCHEMES[scheme], clip=False)
    rounded = quantize.quantize(llama.build(checkpoint, jnp.float32), chosen)
    return dataclasses.replace(loaded, module=prepare(rounded, dequantize="never"))


@functools.cache
def texts(family: str, scheme: str) -> list[list[int]]:
    """Prompts of the goldens with the target's greedy continuations."""
    golden = head_fixtures.Golden("mtp-qwen3")
    prompts = [golden.text(prompt)[0] for prompt in golden.prompts]
    return tiny.greedy(target(family, scheme).module, prompts, max(NEW_TOKENS))


def check(name: str, family: str, scheme: str, batch: int) -> None:
    head, options = DRAFTERS[name]
    built_for, whole = target(family, scheme), texts(family, scheme)
    drafter = heads.build(built_for, str(head_fixtures.folder(head)), **options)
    lengths = [len(text) - max(NEW_TOKENS) for text in whole]
    prompts = [text[:length] for text, length in zip(whole, lengths, strict=True)]
    jobs = tiny.requests(prompts, NEW_TOKENS)[: 6 if batch > 1 else 2]
    done = tiny.run(tiny.engine(built_for.module, drafter, Programs()), jobs, batch)
    for completion in done:
        index = completion.request.request_id
        expected = whole[index][lengths[index] : lengths[index] + NEW_TOKENS[index]]
        COMPARISONS.compare(built_for.module, prompts[index], completion.output_ids, expected)
    histogram = tiny.histogram(done)
    print(f"{name}, {family}, {scheme}, batch {batch}: accepted {histogram.tolist()}")
    if head.endswith(
        family
    ):  # quantization disturbs features, not what a head knows of the language
        assert histogram[1:].sum() > 0
        assert batch == 1 or histogram[-1] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family", "scheme", "batch"), PRODUCT)
def test_greedy_output_is_the_targets(name, family, scheme, batch):
    check(name, family, scheme, batch)


@pytest.mark.slow
def test_ties_are_rare():
    COMPARISONS.check_rare()
