"""Training routers and updates (D-LLM, NeurIPS 2024, section 3): predict the text while running few layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specjax.models.llama import Llama
from specjax.training import batches, loop
from specjax.training.depth import masked
from specjax.training.depth.adapter import Adapter
from specjax.training.depth.masked import Noise


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Batch:
    """Examples padded to one length.

    Attributes:
        tokens: token ids; padding is 0.
        counts: row t counts in the cross-entropy.
        present: the position holds a token of an example.
    """

    tokens: Int[Array, "B T"]
    counts: Bool[Array, "B T"]
    present: Bool[Array, "B T"]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights of the terms.

    Attributes:
        rate: of the distance between the share of layers that a token runs through and the target rate, at the end of
            training; it rises from 0 along a sine.
        dropout: of the outputs of the updates.
    """

    rate: float
    dropout: float


class Trainer(loop.Trainer):
    """An adapter in training; what is on disk is the adapter, its optimizer's moments and the step."""

    def __init__(self, adapter: Adapter, weights: Weights, settings: loop.Settings, folder: Path):
        super().__init__(adapter, _measured, weights, settings, folder)

    def load(self, examples, store, width: int, rows) -> Batch:
        """The batch of some examples; there is no store of features."""
        return load(examples, width, rows)

    def objective(self, head: Adapter, target: Llama, vocab, batch: Batch, key, step):
        """See `loss`."""
        progress = step.astype(jnp.float32) / self.settings.total_steps
        rate = self.weights.rate * jnp.sin(progress * jnp.pi / 2)
        return loss(head, target, batch, rate, Noise(key=key, dropout=self.weights.dropout))


def load(examples, width: int, rows: Sequence[int]) -> Batch:
    """The batch of these examples; an index that occurs again (filling up a batch) counts once."""
    present = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        if row not in rows[:i]:
            present[i, : len(examples[row].tokens)] = True
    return Batch(
        tokens=batches.padded([examples[row].tokens for row in rows], width),
        counts=batches.counted(examples, width, rows),
        present=present,
    )


def loss(
    adapter: Adapter,
    model: Llama,
    batch: Batch,
    rate_weight: Float[Array, ""],
    noise: Noise | None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Cross-entropy with the text, plus `rate_weight` times the distance from the target rate.

    Args:
        noise: of training; None decides as inference does.
    Returns:
        the loss, and sums: `cross_entropy` over `counted` rows; over `routed` tokens (those not reserved) `executed`
        (share of the layers) and `distance` (of that share from the target rate).
    """
    eviction = "mask" if noise is None else "renormalise"
    out = masked.forward(model, adapter, batch.tokens, noise=noise, eviction=eviction)
    measured = _cross_entropy(model, out.hidden, batch)
    share = jnp.mean(out.executed, axis=-1)
    positions = jnp.arange(batch.tokens.shape[1])
    routed = batch.present & (positions >= adapter.config.reserved_tokens)

    def total(values):
        return jnp.sum(jnp.where(routed, values, 0.0))

    measured |= {
        "executed": total(share),
        "distance": total(jnp.abs(share - adapter.config.target_rate)),
        "routed": total(jnp.ones_like(share)),
    }
    value = measured["cross_entropy"] / jnp.maximum(measured["counted"], 1.0)
    value += rate_weight * measured["distance"] / jnp.maximum(measured["routed"], 1.0)
    return value, measured


@jax.jit
def dense(model: Llama, batch: Batch) -> dict[str, Array]:
    """The sums `cross_entropy` and `counted` of the model as it is, all layers for all tokens."""
    hidden = masked.forward(model, None, jnp.asarray(batch.tokens)).hidden
    return _cross_entropy(model, hidden, batch)


def summary(measured: dict[str, Any]) -> dict[str, float]:
    """Means of summed measurements."""
    counted = max(float(measured["counted"]), 1.0)
    found = {"perplexity": float(np.exp(float(measured["cross_entropy"]) / counted))}
    if "routed" in measured:
        routed = max(float(measured["routed"]), 1.0)
        found |= {name: float(measured[name]) / routed for name in ("executed", "distance")}
    return {name: round(value, 4) for name, value in found.items()}


def _measured(adapter: Adapter, model: Llama, vocab, batch: Batch, weights: Weights):
    return loss(adapter, model, batch, jnp.zeros(()), None)


def _cross_entropy(model: Llama, hidden, batch: Batch) -> dict[str, Array]:
    logits = jax.nn.log_softmax(model.logits(hidden))
    following = jnp.roll(batch.tokens, -1, axis=1)
    picked = jnp.take_along_axis(logits, following[..., None], axis=-1)[..., 0]
    return {
        "cross_entropy": -jnp.sum(jnp.where(batch.counts, picked, 0.0)),
        "counted": jnp.sum(batch.counts, dtype=jnp.float32),
    }
