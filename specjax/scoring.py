"""Scores of given texts: logits, and perplexity over windows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from specjax import cache as kv
from specjax.errors import CapacityError, SpecjaxError
from specjax.generate import LanguageModel
from specjax.models import layers
from specjax.models.llama import Llama

_CHUNK = 256  # tokens per pass; bounds the logits that are on the device at once
_WINDOWS = 4  # windows per pass


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per scored token.
        nll: that mean, in nats.
        num_tokens: tokens scored.
        num_windows: windows the text was cut into.
        window: text tokens per window (the last one may be shorter).
    """

    perplexity: float
    nll: float
    num_tokens: int
    num_windows: int
    window: int


def logits(
    model: LanguageModel, input_ids: Int[np.ndarray, "B T"] | Int[Array, "B T"]
) -> Float[np.ndarray, "B T V"]:
    """Logits of the next token after every prefix; float32.

    Sequences go through the model one by one in pieces, so the device holds one piece's logits at a time.

    Raises:
        CapacityError: no tokens, more than the model's positions, or ids outside the vocabulary.
    """
    ids = np.asarray(input_ids)
    batch, length = ids.shape
    _check(model, ids)
    chunk = min(length, _CHUNK)
    padded = -(-length // chunk) * chunk
    rows = np.zeros((batch, padded), np.int32)
    rows[:, :length] = ids
    out = np.empty((batch, length, model.config.vocab_size), np.float32)
    for b in range(batch):
        cache = kv.init(model.config, 1, padded, model.module.dtype)
        for begin in range(0, length, chunk):
            piece = jnp.asarray(rows[b : b + 1, begin : begin + chunk])
            values, cache = _chunk_logits(
                model.module, piece, jnp.full((1,), begin, jnp.int32), cache
            )
            end = min(begin + chunk, length)
            out[b, begin:end] = np.asarray(values[0, : end - begin])
    return out


def perplexity(
    model: LanguageModel, token_ids: Sequence[int] | np.ndarray, window: int = 512
) -> Perplexity:
    """Perplexity of a text that is cut into windows of `window` tokens without overlap.

    Every window stands by itself. With a BOS token (`config.bos_token_id`) each is preceded by it and all its tokens
    are scored; without one, its first token only serves as context.

    Args:
        token_ids: the text, without BOS (a leading one is dropped).
    Raises:
        CapacityError: too few tokens, ids outside the vocabulary, or a window longer than the model's positions.
        SpecjaxError: the model yields values that are not finite.
    """
    ids = np.asarray(token_ids, np.int64)
    bos = model.config.bos_token_id
    if bos is not None and ids.size and ids[0] == bos:
        ids = ids[1:]
    shortest = 2 if bos is None else 1
    if ids.size < shortest:
        raise CapacityError(f"the text has {ids.size} tokens; at least {shortest} are needed")
    if window < shortest:
        raise CapacityError(f"{window=}: at least {shortest} tokens are needed")
    width = min(window, ids.size)
    _check(model, ids[None, :width])
    _check_vocabulary(model, ids)
    inputs, targets = _windows(ids, width, bos)
    losses = np.concatenate(
        [
            np.asarray(_losses(model.module, jnp.asarray(x), jnp.asarray(np.maximum(y, 0))))
            for x, y in _groups(inputs, targets)
        ]
    )[: len(inputs)]
    scored = targets >= 0
    nll = float(np.mean(losses[scored], dtype=np.float64))
    if not math.isfinite(nll):
        raise SpecjaxError(f"the logits of {model.name!r} are not finite; no perplexity")
    return Perplexity(
        perplexity=math.exp(nll),
        nll=nll,
        num_tokens=int(scored.sum()),
        num_windows=len(inputs),
        window=window,
    )


def _windows(ids: np.ndarray, window: int, bos: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets per window [W, T]; target -1 is not scored."""
    count = -(-ids.size // window)
    text = np.full((count, window), -1, np.int32)
    text.flat[: ids.size] = ids
    if bos is None:
        inputs, targets = text[:, :-1], text[:, 1:]
    else:
        first = np.full((count, 1), bos, np.int32)
        inputs, targets = np.concatenate([first, text[:, :-1]], axis=1), text
    return np.maximum(inputs, 0), targets


def _groups(inputs: np.ndarray, targets: np.ndarray):
    """Windows in groups of one size, the last one filled up with copies of its first."""
    size = min(_WINDOWS, len(inputs))
    for begin in range(0, len(inputs), size):
        rows = np.arange(begin, begin + size)
        rows[rows >= len(inputs)] = begin
        yield inputs[rows], targets[rows]


def _check(model: LanguageModel, ids: np.ndarray) -> None:
    positions = model.config.max_position_embeddings
    if ids.size == 0:
        raise CapacityError(f"input_ids of shape {list(ids.shape)} hold no tokens")
    if ids.shape[1] > positions:
        raise CapacityError(
            f"sequences of {ids.shape[1]} tokens exceed the model's max_position_embeddings={positions}"
        )
    _check_vocabulary(model, ids)


def _check_vocabulary(model: LanguageModel, ids: np.ndarray) -> None:
    wrong = ids[(ids < 0) | (ids >= model.config.vocab_size)]
    if wrong.size:
        raise CapacityError(
            f"input_ids contain {wrong[0]}, outside the vocabulary of {model.config.vocab_size}"
        )


def _chunk_logits_traced(
    module: Llama, tokens: Int[Array, "B T"], start: Int[Array, "B"], cache: kv.KVCache
):
    out = module(layers.causal_block(tokens, start), cache)
    return module.logits(out.hidden), out.cache


_chunk_logits = jax.jit(_chunk_logits_traced, donate_argnames="cache")


@jax.jit
def _losses(
    module: Llama, inputs: Int[Array, "B T"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Negative log-likelihood of the targets; the logits of one window at a time."""
    batch, length = inputs.shape
    cache = kv.init(module.config, batch, length, module.dtype)
    block = layers.causal_block(inputs, jnp.zeros((batch,), jnp.int32))
    hidden = module(block, cache).hidden

    def of_window(pair):
        rows, labels = pair
        values = module.logits(rows)
        chosen = jnp.take_along_axis(values, labels[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(values, axis=-1) - chosen

    return lax.map(of_window, (hidden, targets))
