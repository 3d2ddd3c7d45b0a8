"""What sampling should do, in numpy float64, and whether counts could have come from it."""

import numpy as np
import scipy.stats

from tests.oracle import softmax

# A right sampler fails a test once in 10,000 seeds; the seeds are fixed.
SIGNIFICANCE = 1e-4


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0) -> np.ndarray:
    """Temperature, then top-k, then the smallest set of likeliest tokens whose mass reaches top-p; one row.

    Tokens that tie with the last one kept are kept too.
    """
    scaled = np.asarray(logits, np.float64) / temperature
    if top_k:
        scaled = np.where(
            scaled >= np.sort(scaled)[::-1][min(top_k, scaled.size) - 1], scaled, -np.inf
        )
    mass = softmax(scaled)
    if top_p < 1:
        ordered = np.sort(mass)[::-1]
        count = 1 + np.searchsorted(np.cumsum(ordered), top_p)
        scaled = np.where(mass >= ordered[min(count, mass.size) - 1], scaled, -np.inf)
    return softmax(scaled)


def p_value(counts: np.ndarray, expected: np.ndarray) -> float:
    """Chi-square test that `counts` are draws from the distribution `expected`; rare cells are pooled.

    A draw of something that has no probability at all gives 0.
    """
    counts, expected = counts.ravel(), expected.ravel() * counts.sum()
    if counts[expected == 0].any():
        return 0.0
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    seen = expected > 0
    if seen.sum() < 2:
        return 1.0
    expected = expected[seen] * counts[seen].sum() / expected[seen].sum()
    return float(scipy.stats.chisquare(counts[seen], expected).pvalue)
