"""Batches of examples of similar length: few compiled shapes, little padding, an order that follows from the step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

_BUCKET = 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Batch:
    """Examples with the target's features, padded to one length.

    Attributes:
        tokens: token ids; padding is 0.
        inputs: what the head reads of the target at each position.
        final: the target's features after its final norm.
        greedy: the target's own next token after each position.
        counts: row t counts in the loss as a position whose next token is known text of the document.
    """

    tokens: Int[Array, "B T"]
    inputs: Float[Array, "B T A"]
    final: Float[Array, "B T D"]
    greedy: Int[Array, "B T"]
    counts: Bool[Array, "B T"]


def plan(lengths: Sequence[int], tokens_per_batch: int) -> list[tuple[int, list[int]]]:
    """(padded length, indices of examples) of each batch, shortest first; every batch of a length has as many rows."""
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(-(-length // _BUCKET) * _BUCKET, []).append(index)
    batches = []
    for width, indices in sorted(groups.items()):
        rows = max(1, tokens_per_batch // width)
        for begin in range(0, len(indices), rows):
            chosen = indices[begin : begin + rows]
            batches.append((width, (chosen * rows)[:rows] if len(chosen) < rows else chosen))
    return batches


def padded(rows: Sequence[Shaped[np.ndarray, "..."]], width: int) -> np.ndarray:
    """Rows of different lengths in one array, zeros behind."""
    out = np.zeros((len(rows), width, *rows[0].shape[1:]), rows[0].dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def load(examples, store, width: int, rows: Sequence[int]) -> Batch:
    """The batch of these examples; an index that occurs again (filling up a batch) counts once."""
    parts = [store.rows(row) for row in rows]
    return Batch(
        tokens=padded([examples[row].tokens for row in rows], width),
        inputs=padded([part[0] for part in parts], width).astype(np.float32),
        final=padded([part[1] for part in parts], width).astype(np.float32),
        greedy=padded([part[2] for part in parts], width),
        counts=counted(examples, width, rows),
    )


def counted(examples, width: int, rows: Sequence[int]) -> Bool[np.ndarray, "B T"]:
    """Positions that count in the loss; see `Batch.counts` and `load`."""
    counts = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        length = len(examples[row].tokens)
        if row not in rows[:i]:
            # Row t predicts the token at t + 1; the last position's is not in the text.
            counts[i, max(examples[row].response - 1, 0) : length - 1] = True
    return counts


def shuffled(
    plan: Sequence[tuple[int, list[int]]], seed: int, first_step: int
) -> Iterator[tuple[int, tuple[int, list[int]]]]:
    """(epoch, batch) of steps first_step, first_step + 1, ... without end; every epoch has its own order."""
    step = first_step
    while True:
        epoch, index = divmod(step, len(plan))
        order = np.random.default_rng((seed, epoch)).permutation(len(plan))
        yield epoch, plan[order[index]]
        step += 1
