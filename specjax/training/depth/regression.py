"""Logistic regression of the Predictor: fitting and how well it separates."""

import numpy as np
from jaxtyping import Bool, Float

from specjax.errors import ConfigError

_STEPS, _TOLERANCE = 50, 1e-9


def fit(
    features: Float[np.ndarray, "M D"], labels: Bool[np.ndarray, "M"], ridge: float = 1e-3
) -> tuple[Float[np.ndarray, "D"], float]:
    """Weight and bias of the least binary cross-entropy with both classes weighing the same, by Newton's method.

    Args:
        ridge: penalty of the squared weight of standardized features, per example.
    Raises:
        ConfigError: only one class occurs.
    """
    counts = np.bincount(labels.astype(int), minlength=2)
    if not counts.all():
        raise ConfigError(
            f"{counts[1]} accepted and {counts[0]} rejected nodes: both are needed; decode more, or draft other trees"
        )
    x = features.astype(np.float64)
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-6
    x = np.concatenate([(x - mean) / scale, np.ones((len(x), 1))], axis=1)
    share = np.where(labels, 0.5 / counts[1], 0.5 / counts[0])
    penalty = np.append(np.full(features.shape[1], ridge), 0.0)
    solution, value = np.zeros(x.shape[1]), np.log(2.0)
    for _ in range(_STEPS):
        probability = _sigmoid(x @ solution)
        slope = x.T @ (share * (probability - labels)) + penalty * solution
        curvature = (x * (share * probability * (1 - probability))[:, None]).T @ x
        step = np.linalg.solve(curvature + np.diag(penalty + 1e-12), slope)
        # Halved until it helps: far from the solution a whole step may overshoot.
        while True:
            candidate = solution - step
            new_value = _loss(x, labels, share, penalty, candidate)
            if new_value <= value or np.abs(step).max() < _TOLERANCE:
                break
            step = step / 2
        converged = value - new_value < _TOLERANCE
        solution, value = candidate, new_value
        if converged:
            break
    weight = solution[:-1] / scale
    return weight, float(solution[-1] - weight @ mean)


def auc(scores: Float[np.ndarray, "M"], labels: Bool[np.ndarray, "M"]) -> float:
    """Probability that an accepted example scores above a rejected one; ties count half.

    Raises:
        ConfigError: only one class occurs.
    """
    positive, negative = int(labels.sum()), int((~labels).sum())
    if not positive or not negative:
        raise ConfigError(
            f"{positive} accepted and {negative} rejected nodes are held out: both are needed for an AUC"
        )
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    total = ranks[inverse][labels].sum()
    return float((total - positive * (positive + 1) / 2) / (positive * negative))


def _sigmoid(x):
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))


def _loss(x, labels, share, penalty, solution) -> float:
    signed = np.where(labels, 1.0, -1.0) * (x @ solution)
    return float(share @ np.logaddexp(0.0, -signed) + 0.5 * penalty @ solution**2)
