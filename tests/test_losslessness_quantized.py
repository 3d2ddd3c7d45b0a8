"""Greedy output does not depend on the drafter under any quantization scheme: the product drafter x scheme x batch.

Targets are the fixture models rounded to nearest, run on their codes; the reference is whole passes over the text, so
neither the decoding loop nor its cache takes part in it.
"""

import functools
from dataclasses import dataclass

import numpy as np
import pytest

from specjax.drafters.self_draft import SelfDraft
from specjax.engine.engine import Programs
from specjax.quant.scheme import SCHEMES
from tests import planned, ties, tiny

MIN, MIDDLE, MAX = "min", "middle", "max"
ALL = {MIN, MIDDLE, MAX}
COMPARISONS = ties.Comparisons()

# Drafting for itself, a target of each scheme is viewed under another one that reads the same codes.
SELF_SCHEMES = {
    "w8a16": "w8a8",
    "w8a8": "w8a16",
    "w4a16": "w4a8",
    "w4a16-asym": "w4a8-asym",
    "w4a8": "w4a4",
    "w4a8-qqq": "w4a4",
    "w4a8-qoq": "w4a4-qoq",
    "w4a4": "w4a8",
    "fp8": "fp8-a16",
    "fp8-a16": "fp8",
    "fp4": "fp4-a8",
    "fp4-a8": "fp4-a4",
    "fp4-a4": "fp4-a8",
}
# Drafters whose acceptance is known beforehand, and what it is.
PLANS = {
    "planned": (planned.CHAIN, (2, 0, 4, 1, 3)),
    "planned-tree": (planned.TREE, (1, 3, 0, 2)),
    "oracle": (planned.CHAIN, (4,)),
    "oracle-tree": (planned.TREE, (3,)),
    "adversary": (planned.CHAIN, (0,)),
}
# What must occur in a batch of four, whatever the scheme. Of `lm`, a disturbed copy of the dense model, coarse schemes
# need not accept every draft of a step; oracles show that case under each of them.
MUST_OCCUR = {
    "none": {MIN},
    "ngram": {MIN, MIDDLE},
    "lm": {MIN, MIDDLE},
    "self": {MAX},
    "planned": ALL,
    "planned-tree": ALL,
    "oracle": {MAX},
    "oracle-tree": {MAX},
    "adversary": {MIN},
}
DRAFTERS = (*tiny.DRAFTERS, *PLANS)
PRODUCT = [(name, scheme, batch) for scheme in SCHEMES for name in DRAFTERS for batch in (1, 4)]
# The fast cover, on one layer: chains and trees of every kind with the three kinds of schemes.
SETTINGS = ("w4a16", "w8a8", "w4a8-qqq")
COVER = [(name, scheme) for scheme in SETTINGS for name in ("lm", "self", "eagle")]
COVER += [
    (name, SETTINGS[index]) for index, name in enumerate(("planned", "planned-tree", "oracle"))
]
COVER += [
    ("ngram", "w4a16"),
    ("eagle-reduced", "w4a16"),
    ("hierarchical", "w8a8"),
    ("medusa", "w4a8-qqq"),
    ("head", "w4a16"),
    ("block", "w8a8"),
    ("merge", "w4a16"),
    ("suffix", "w8a8"),
]


@pytest.fixture(autouse=True)
def hurry():
    """The products are many; the slow tests of dense targets compile as users do."""
    with tiny.hurried_compiler():
        yield


@functools.lru_cache(maxsize=1)
def programs(scheme: str) -> Programs:
    """Executables that the cases of a scheme share."""
    return Programs()


@dataclass(frozen=True)
class Setup:
    """A quantized target.

    Attributes:
        scheme: of its linears.
        fixture: the dense checkpoint.
        is_short: whether only its first layer is kept.
    """

    scheme: str
    fixture: str = "tiny-fp16"
    is_short: bool = False

    @functools.cached_property
    def target(self):
        full = tiny.quantized_model(self.scheme, self.fixture)
        return tiny.shortened(full) if self.is_short else full

    @functools.cached_property
    def texts(self) -> list[list[int]]:
        """The prompts with the target's greedy continuations, some tokens longer than any test asks for."""
        return tiny.greedy(self.target, tiny.prompts(), max(tiny.NEW_TOKENS) + 6)

    def drafter(self, name: str):
        if name in PLANS:
            shape, plan = PLANS[name]
            return planned.planned(self.texts, plan, shape)
        if name == "self":
            return SelfDraft(draft_depth=3, scheme=SELF_SCHEMES[self.scheme])
        return tiny.DRAFTERS[name](parts(self.fixture, self.is_short))


setup = functools.cache(Setup)


@functools.cache
def parts(fixture: str, is_short: bool) -> tiny.Parts:
    """Made from the dense model, so that one set of heads and draft models serves all schemes."""
    dense = tiny.fixture_model(fixture)
    return tiny.Parts(tiny.shortened(dense) if is_short else dense, fixture)


def occurred(histogram: np.ndarray) -> set[str]:
    """Which of minimum, middle and maximum acceptance a histogram has."""
    found = {MIN} if histogram[0] else set()
    found |= {MIDDLE} if histogram[1:-1].any() else set()
    return found | ({MAX} if histogram[-1] else set())


def check(of: Setup, name: str, batch: int) -> None:
    prompts = tiny.prompts()
    # Four of one prefill shape: nothing is compiled twice; refilling is tested with dense targets.
    jobs = tiny.requests(prompts, tiny.NEW_TOKENS)
    jobs = jobs[:4] if batch == 4 else jobs[2:3]
    drafter = of.drafter(name)
    done = tiny.run(tiny.engine(of.target, drafter, programs(of.scheme)), jobs, batch)
    for completion in done:
        index = completion.request.request_id
        begin = len(prompts[index])
        expected = of.texts[index][begin : begin + tiny.NEW_TOKENS[index]]
        COMPARISONS.compare(of.target, prompts[index], completion.output_ids, expected)
    histogram = tiny.histogram(done)
    print(f"{name}, {of.scheme}, batch {batch}: steps by accepted drafts {histogram.tolist()}")
    if batch == 4:
        assert MUST_OCCUR.get(name, set()) <= occurred(histogram)
    if name in PLANS and "tie" not in COMPARISONS.outcomes[-len(done) :]:
        for completion in done:
            check_plan(drafter, completion.metrics.acceptance_histogram)


@pytest.mark.parametrize(("name", "scheme"), COVER, ids=["-".join(case) for case in COVER])
def test_greedy_output_is_the_quantized_targets(name, scheme):
    check(setup(scheme, is_short=True), name, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scheme", "batch"), PRODUCT, ids=["-".join(map(str, case)) for case in PRODUCT]
)
def test_product_of_drafters_schemes_and_batches(name, scheme, batch):
    check(setup(scheme, "tiny8-fp16" if name == "eagle3" else "tiny-fp16"), name, batch)


def check_plan(drafter, histogram) -> None:
    """A planned drafter accepts as planned: so many steps of each length, from the first on."""
    steps = np.arange(sum(histogram)) % len(drafter.plan)
    expected = np.bincount(np.asarray(drafter.plan)[steps], minlength=len(histogram))
    assert list(histogram) == expected.tolist()


def test_every_scheme_is_in_the_product():
    assert set(SELF_SCHEMES) == set(SCHEMES)


def test_ties_are_rare():
    COMPARISONS.check_rare()
