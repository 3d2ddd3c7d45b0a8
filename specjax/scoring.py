"""Scores of given texts: logits, likelihoods of continuations, and perplexity over windows."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from specjax.decoding import sampling as sample
from specjax.engine import engine
from specjax.errors import CapacityError, SpecjaxError
from specjax.language_model import LanguageModel
from specjax.models import cache as kv
from specjax.models import layers
from specjax.models.llama import Llama

_CHUNK = 256  # tokens per pass; bounds the logits that are on the device at once
_WINDOWS = 4  # windows per pass


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """How likely a model finds a continuation.

    Attributes:
        logprob: sum of the log-probabilities of its tokens, in nats.
        is_greedy: every token is the model's first choice.
    """

    logprob: float
    is_greedy: bool


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
                *(model.module, piece, jnp.full((1,), begin, jnp.int32)),
                *(jnp.full((1,), length, jnp.int32), cache),
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
            np.asarray(_scores(model.module, jnp.asarray(x), jnp.asarray(y))[0])
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


def likelihoods(
    model: LanguageModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> Iterator[tuple[int, Likelihood]]:
    """Yields (index of the pair, likelihood of its continuation after its context), longest pairs first.

    Args:
        pairs: token ids of a context, at least one, and of a continuation.
    Raises:
        CapacityError: an empty context, ids outside the vocabulary, or more tokens than the model has positions.
    """
    for index, (context, continuation) in enumerate(pairs):
        if len(context) == 0:
            raise CapacityError(f"pair {index}: the context is empty; at least one token is needed")
        _check(model, np.asarray([[*context, *continuation][:-1] or context], np.int64))
        _check_vocabulary(model, np.asarray([*context, *continuation], np.int64))
    lengths = [len(context) + len(continuation) - 1 for context, continuation in pairs]
    order = sorted(range(len(pairs)), key=lambda index: -lengths[index])
    for begin in range(0, len(order), _WINDOWS):
        group = order[begin : begin + _WINDOWS]
        width = engine.bucket(max(lengths[group[0]], 1))
        inputs = np.zeros((_WINDOWS, width), np.int32)
        targets = np.full((_WINDOWS, width), -1, np.int32)
        for row, index in enumerate(group):
            context, continuation = pairs[index]
            text = [*context, *continuation]
            inputs[row, : len(text) - 1] = text[:-1]
            targets[row, len(context) - 1 : len(text) - 1] = continuation
        losses, greedy = _scores(model.module, jnp.asarray(inputs), jnp.asarray(targets))
        scored = targets >= 0
        sums = np.sum(np.asarray(losses, np.float64), axis=1, where=scored)
        all_greedy = np.all(np.asarray(greedy) | ~scored, axis=1)
        for row, index in enumerate(group):
            yield index, Likelihood(logprob=-float(sums[row]), is_greedy=bool(all_greedy[row]))


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
    module: Llama,
    tokens: Int[Array, "B T"],
    start: Int[Array, "B"],
    length: Int[Array, "B"],
    cache: kv.KVCache,
):
    out = module(layers.causal_block(tokens, start, length), cache)
    return module.logits(out.hidden), out.cache


_chunk_logits = jax.jit(_chunk_logits_traced, donate_argnames="cache")


@jax.jit
def _scores(
    module: Llama, inputs: Int[Array, "B T"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Negative log-likelihood of the targets and whether they are the first choice; logits of one row at a time.

    Targets of -1 stand for nothing; the texts end with their last target.
    """
    batch, length = inputs.shape
    cache = kv.init(module.config, batch, length, module.dtype)
    ends = jnp.max(jnp.where(targets >= 0, jnp.arange(1, length + 1, dtype=jnp.int32), 0), axis=1)
    block = layers.causal_block(inputs, jnp.zeros((batch,), jnp.int32), ends)
    targets = jnp.maximum(targets, 0)
    hidden = module(block, cache).hidden

    def of_window(pair):
        rows, labels = pair
        values = module.logits(rows)
        chosen = jnp.take_along_axis(values, labels[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(values, axis=-1) - chosen, sample.most_likely(values) == labels

    return lax.map(of_window, (hidden, targets))
