"""Hypothesis strategies: draft trees with their invariants, row counts at the edges of tiles, logits."""

import hypothesis
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

# Examples are the same in every run, and compilation makes single ones slow.
SETTINGS = hypothesis.settings(
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)

# Numbers of rows around the sizes in which kernels and matmuls work.
ROW_COUNTS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)

# Sizes of drawn trees: few, because every size compiles anew.
TREE_SIZES = (1, 2, 5, 9, 16)


def row_counts(most: int = 65) -> st.SearchStrategy[int]:
    """Row counts at tile edges."""
    return st.sampled_from([count for count in ROW_COUNTS if count <= most])


@st.composite
def parents(draw, num_nodes: int, unused: bool = True) -> np.ndarray:
    """Parents [N] of one tree: the root first, a parent before its children, some nodes unused (-1).

    The shape of trees varies between chains, stars and anything between.
    """
    reach = draw(st.sampled_from([1, 2, num_nodes]))
    result = [-1]
    for node in range(1, num_nodes):
        if unused and draw(st.integers(0, 9)) == 0:
            result.append(-1)
            continue
        in_tree = [0] + [n for n in range(1, node) if result[n] >= 0]
        result.append(draw(st.sampled_from(in_tree[-reach:])))
    return np.asarray(result, np.int32)


@st.composite
def forests(draw, batch: int = 3, unused: bool = True) -> np.ndarray:
    """Parents [B, N] of a batch of trees of one size."""
    num_nodes = draw(st.sampled_from(TREE_SIZES))
    return np.stack([draw(parents(num_nodes, unused)) for _ in range(batch)])


def seeds() -> st.SearchStrategy[int]:
    """Seeds for numpy, where drawing each number would be slow and shrink to nothing readable."""
    return st.integers(0, 2**31 - 1)


def logits(vocab: int) -> st.SearchStrategy[np.ndarray]:
    """One row of logits with ties and large gaps."""
    values = st.floats(-30, 30, width=32) | st.sampled_from([0.0, 1.0, 1.0, 2.0])
    return hnp.arrays(np.float32, vocab, elements=values)
