"""What a draft head is trained to do.

EAGLE heads (`unrolled`): the head's own outputs are fed back as they are while drafting, step after step, and every
step is compared with the target. One step is the recipe of EAGLE-1/2 (arXiv 2401.15077, section 4.2: smooth L1 on the
feature and soft cross-entropy on the token); several are the training-time test of EAGLE-3 (arXiv 2503.01840, section
3.2), which knows no feature loss. Medusa heads (`medusa`): cross-entropy with the text, one term per head.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from specjax.decoding import sampling as sample
from specjax.models import cache as kv
from specjax.models import layers
from specjax.models.eagle3 import Eagle3Head
from specjax.models.llama import Llama
from specjax.training import vocabulary as vocabularies
from specjax.training.batches import Batch
from specjax.training.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights of the terms.

    Attributes:
        steps: drafting steps that are unrolled.
        regression: of the smooth L1 loss of features; 0 for EAGLE-3.
        cross_entropy: of the soft cross-entropy of tokens.
        decay: a step weighs this times the one before.
    """

    steps: int
    regression: float
    cross_entropy: float
    decay: float


def unrolled(
    head, target: Llama, vocab: Vocabulary, batch: Batch, weights: Weights
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Loss and measurements of an EAGLE head.

    Row t joins the feature at t with the token at t + 1; its output stands for the feature at t + 1, so it predicts the
    token at t + 2.

    Returns:
        the loss, and sums over counted rows per step [steps]: `agreed` (the head's most likely token is the target's),
        `counted`, `cross_entropy`, `regression`.
    """
    width, head = batch.tokens.shape[1], _computing_as(target, head)
    following = jax.tree.map(_following, batch)
    wanted = jax.nn.softmax(vocabularies.logits(vocab, following.final))
    known = vocab.index[following.greedy] >= 0
    loss, measured = jnp.zeros(()), []
    for step, hidden in enumerate(drafted(head, target, batch, weights.steps)):
        counts = following.counts & (jnp.arange(width) >= step)
        logits = _logits(head, hidden, target, vocab)
        terms = _terms(hidden, logits, wanted, following, counts, counts & known)
        loss += weights.decay**step * (
            weights.regression * terms["regression"] / jnp.maximum(terms["counted"], 1)
            + weights.cross_entropy * terms["cross_entropy"] / jnp.maximum(terms["known"], 1)
        )
        terms["agreed"] = _agreed(logits, vocab, following.greedy, counts & known)
        measured.append(terms)
    return loss, jax.tree.map(lambda *rows: jnp.stack(rows), *measured)


def drafted(head, target: Llama, batch: Batch, steps: int) -> Iterator[Float[Array, "B T D"]]:
    """What the head puts out in step 0 from true features, in later steps from its own outputs.

    Row t of step s is what drafting yields s + 1 tokens after the last true feature, the one at t - s. Rows t < s mean
    nothing.
    """
    size, width = batch.tokens.shape
    cache = kv.init(head.config, size, steps * width, head.dtype, num_layers=1)
    tokens, hidden = _following(batch.tokens), head.fuse(batch.inputs.astype(head.dtype))
    for step in range(steps):
        hidden, cache = head(hidden, _block(tokens, step), cache, target)
        yield hidden
        # What stands for the feature at t comes out of row t - 1.
        hidden = jnp.roll(hidden, 1, axis=1)


def medusa(
    heads, target: Llama, vocab: Vocabulary, batch: Batch, weights: Weights
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Loss and measurements of Medusa heads; same results as `unrolled`, with heads in place of steps.

    Head i reads the feature at t and predicts the token at t + 2 + i of the text.
    """
    loss, measured = jnp.zeros(()), []
    for i, head in enumerate(_computing_as(target, heads).heads):
        following = jax.tree.map(lambda x, i=i: jnp.roll(x, -(i + 1), axis=1), batch)
        counts = following.counts & (
            jnp.arange(batch.tokens.shape[1]) < batch.counts.shape[1] - i - 1
        )
        logits = jax.nn.log_softmax(head(batch.final.astype(target.dtype)))
        wanted = jnp.roll(following.tokens, -1, axis=1)
        picked = jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
        counted = jnp.sum(counts, dtype=jnp.float32)
        total = -jnp.sum(jnp.where(counts, picked, 0))
        loss += weights.decay**i * total / jnp.maximum(counted, 1)
        agreed = jnp.sum(
            (sample.most_likely(lax.stop_gradient(logits)) == following.greedy) & counts
        )
        zero = jnp.zeros(())
        terms = {"regression": zero, "cross_entropy": total, "counted": counted, "known": counted}
        measured.append(terms | {"agreed": agreed})
    return loss, jax.tree.map(lambda *rows: jnp.stack(rows), *measured)


def _computing_as(target: Llama, head):
    """The head in the target's dtype; its parameters stay what they are where they are trained."""

    def cast(leaf):
        floating = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(target.dtype) if floating else leaf

    return jax.tree.map(cast, head)


def _following(x):
    """Values of the next position."""
    return jnp.concatenate([x[:, 1:], jnp.zeros_like(x[:, :1])], axis=1)


def _block(tokens: Int[Array, "B T"], step: int) -> layers.Block:
    """Rows of one step: they see the text up to where drafting began, and what was drafted since.

    Slot i * T + j holds row j of step i. A row t of step s was reached from row t - s of step 0, by way of row
    t - s + i of each step i.
    """
    size, width = tokens.shape
    rows, columns = np.arange(width)[:, None], np.arange(width)
    text = columns <= rows - step
    drafted = [columns == rows - step + i for i in range(1, step + 1)]
    sees = np.concatenate([text, *drafted], axis=1)
    zeros = jnp.zeros((size,), jnp.int32)
    return layers.Block(
        tokens=tokens,
        positions=jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), tokens.shape),
        start=zeros + step * width,
        prefix=zeros,
        tail=jnp.broadcast_to(jnp.asarray(sees), (size, *sees.shape)),
    )


def _logits(head, hidden: Float[Array, "B T D"], target: Llama, vocab: Vocabulary):
    if isinstance(head, Eagle3Head):
        return head.logits(hidden, target)
    return vocabularies.logits(vocab, hidden)


def _terms(
    hidden: Float[Array, "B T D"],
    logits: Float[Array, "B T U"],
    wanted: Float[Array, "B T U"],
    following: Batch,
    counts: Bool[Array, "B T"],
    known: Bool[Array, "B T"],
) -> dict[str, Array]:
    cross = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(wanted * logits, axis=-1)
    distance = jnp.zeros_like(cross)
    if hidden.shape == following.final.shape:
        gap = jnp.abs(hidden.astype(jnp.float32) - following.final)
        distance = jnp.mean(jnp.where(gap < 1, 0.5 * gap * gap, gap - 0.5), axis=-1)
    return {
        "regression": jnp.sum(jnp.where(counts, distance, 0)),
        "cross_entropy": jnp.sum(jnp.where(known, cross, 0)),
        "counted": jnp.sum(counts, dtype=jnp.float32),
        "known": jnp.sum(known, dtype=jnp.float32),
    }


def _agreed(logits, vocab: Vocabulary, greedy: Int[Array, "B T"], counts) -> Int[Array, ""]:
    chosen = sample.most_likely(lax.stop_gradient(logits))
    return jnp.sum((vocab.ids[chosen] == greedy) & counts)
