"""What the fast tests promise: which pairs of choices meet in at least one of them, counted over their tables.

The whole products are slow tests. A table that loses a combination makes a count fall, and fails here.
"""

import itertools
from collections.abc import Iterator

import pytest

from specjax.drafters import registry
from tests import (
    test_architectures,
    test_losslessness,
    test_losslessness_quantized,
)
from tests.depth import test_compose
from tests.verify import test_verify

# Names of cases -> the kind of drafter in the registry; planned ones propose what a test says.
KINDS = {
    **{"lm-same": "lm", "lm-noisy": "lm", "lm-other": "lm", "narrow": "lm", "wide": "lm"},
    **{"eagle-d2k4n8": "eagle", "eagle-d6k10n60": "eagle", "eagle-d5k1n6": "eagle"},
    **{
        "eagle3": "eagle",
        "eagle-reduced": "eagle",
        "one-pass": "head",
        "block": "head",
        "pard": "head",
        "nested": "hierarchical",
    },
    **{"codes-none": "none", "codes-self-w4a8": "self"},
    **{"oracle": "planned", "oracle-tree": "planned", "adversary": "planned"},
    **{"planned-tree": "planned", "chain": "planned", "tree": "planned"},
}
PLAIN = {"weights": "dense", "depth": "full", "drawn": "greedy", "architecture": "llama"}


def cell(drafter: str, batch: int, **others: str) -> dict[str, str]:
    """One tested combination."""
    kind = KINDS.get(drafter, drafter)
    return {"drafter": kind, "batch": "one" if batch == 1 else "many"} | PLAIN | others


def cells() -> Iterator[dict[str, str]]:
    """The combinations of the fast tests."""
    for name, batch in test_losslessness.FAST:
        yield cell(name, batch, weights="w4a16" if name.startswith("codes") else "dense")
    for name, scheme in test_losslessness_quantized.COVER:
        yield cell(name, 4, weights=scheme)
    for name, scheme, batch in test_compose.FAST:
        yield cell(name, batch, weights=scheme, depth="routed")
    for name, filters, batch in test_verify.FAST:
        yield cell(name, batch, drawn=f"sampled, filters {filters}")
    for name, drafter, batch in test_architectures.PAIRS:
        yield cell(drafter, batch, architecture=name)


# Axes -> pairs of their values that meet.
PROMISED = {
    ("drafter", "batch"): 14,
    ("drafter", "weights"): 23,
    ("drafter", "depth"): 12,
    ("drafter", "drawn"): 12,
    ("drafter", "architecture"): 14,
    ("batch", "weights"): 5,
    ("batch", "drawn"): 6,
    ("batch", "architecture"): 8,
    ("weights", "depth"): 6,
}


@pytest.mark.parametrize("axes", PROMISED, ids=" x ".join)
def test_pairs_that_meet(axes):
    first, second = axes
    met = {(found[first], found[second]) for found in cells()}
    print(f"{len(met)} pairs of {first} and {second}: {sorted(met)}")
    assert len(met) >= PROMISED[axes]


def test_every_drafter_meets_dense_and_quantized_weights_and_a_batch():
    met = {(found["drafter"], found["weights"] != "dense") for found in cells()}
    needed = itertools.product((*registry.kinds(), "planned"), (False, True))
    assert set(needed) - {("none", True)} <= met
    batches = {found["drafter"] for found in cells() if found["batch"] == "many"}
    assert set(registry.kinds()) <= batches
