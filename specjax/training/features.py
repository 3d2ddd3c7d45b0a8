"""What the target computes over the training text, on disk: features, and its own next token."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Int

from specjax.decoding import sampling as sample
from specjax.decoding import target as passes
from specjax.files import writer
from specjax.models import cache as kv
from specjax.models.llama import Llama
from specjax.training import batches
from specjax.training.text import Example

_log = logging.getLogger(__name__)


class FeatureStore:
    """Features of all tokens of a list of examples, in bfloat16 files of a folder.

    Rows of `final` are the target's features after its final norm, from which it predicts; `inputs` what the head reads
    (the same rows, or the named layers' inputs side by side); `greedy` is the target's most likely next token.

    Made batch by batch; an interrupted run goes on where it stopped. A folder that belongs to other text or another
    target (its `fingerprint` differs) is made anew.
    """

    def __init__(self, folder: Path, examples: Sequence[Example], config, needs, fingerprint: dict):
        self._offsets = np.cumsum([0, *(len(example.tokens) for example in examples)])
        self._examples, self._needs, self._folder = examples, needs, folder
        self._marker = folder / "features.json"
        total, hidden = int(self._offsets[-1]), config.hidden_size
        self._state = {"fingerprint": fingerprint | {"tokens": total}, "finished_batches": 0}
        known = json.loads(self._marker.read_text()) if self._marker.is_file() else None
        same = known is not None and known["fingerprint"] == self._state["fingerprint"]
        if known is not None and not same:
            _log.info("%s holds features of other text or another target: starting over", folder)
        if same:
            self._state = known
        folder.mkdir(parents=True, exist_ok=True)
        mode = "r+" if same else "w+"
        width = hidden if needs == "final" else hidden * len(needs)
        bf16 = ml_dtypes.bfloat16
        self._final = _file(folder / "final.bin", bf16, mode, (total, hidden))
        self._inputs = self._final
        if needs != "final":
            self._inputs = _file(folder / "inputs.bin", bf16, mode, (total, width))
        self._greedy = _file(folder / "greedy.bin", np.int32, mode, (total,))

    def compute(self, target: Llama, tokens_per_batch: int, progress) -> None:
        """Fills in what is missing.

        Args:
            progress: called with the number of tokens after each batch.
        """
        plan = batches.plan([len(e.tokens) for e in self._examples], tokens_per_batch)
        for index, (width, rows) in enumerate(plan):
            if index >= self._state["finished_batches"]:
                self._fill(target, width, rows)
                self._state["finished_batches"] = index + 1
                writer.replace_json(self._marker, self._state)
            progress(sum(len(self._examples[row].tokens) for row in rows))
        for array in (self._final, self._inputs, self._greedy):
            array.flush()

    def _fill(self, target: Llama, width: int, rows: Sequence[int]) -> None:
        tokens = batches.padded([self._examples[row].tokens for row in rows], width)
        final, inputs, greedy = _run(target, jnp.asarray(tokens), self._needs)
        for i, row in enumerate(rows):
            begin, end = self._offsets[row], self._offsets[row + 1]
            self._final[begin:end] = np.asarray(final[i, : end - begin])
            self._greedy[begin:end] = np.asarray(greedy[i, : end - begin])
            if self._needs != "final":
                self._inputs[begin:end] = np.asarray(inputs[i, : end - begin])

    def rows(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(inputs [T, A], final [T, D], greedy [T]) of one example."""
        span = slice(self._offsets[index], self._offsets[index + 1])
        return self._inputs[span], self._final[span], self._greedy[span]


@jax.jit(static_argnames=("needs",))
def _run(
    model: Llama, tokens: Int[Array, "B T"], needs
) -> tuple[Float[Array, "B T D"], Float[Array, "B T A"], Int[Array, "B T"]]:
    batch, width = tokens.shape
    cache = kv.init(model.config, batch, width, model.dtype)
    start = jnp.zeros((batch,), jnp.int32)
    out, inputs = passes.forward_chunk(model, tokens, start, cache, needs)
    greedy = jax.lax.map(lambda rows: sample.most_likely(model.logits(rows)), out.hidden)
    bf16 = jnp.bfloat16
    return out.hidden.astype(bf16), inputs.astype(bf16), greedy


def _file(path: Path, dtype, mode: str, shape) -> np.memmap:
    return np.memmap(path, dtype=dtype, mode=mode, shape=shape)
