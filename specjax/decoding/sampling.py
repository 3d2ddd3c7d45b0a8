"""From logits to distributions and from distributions to tokens.

The same filtered distribution is used to draft, to accept and to resample, which is what makes sampling lossless with
respect to the *filtered* target.
"""

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from specjax.config.fields import whole
from specjax.decoding import filters
from specjax.errors import ConfigError

_CHUNK = 512
# Divisors whose reciprocal is a normal float32 as they are: what is smaller or larger gives the same distribution.
_COLDEST = float(np.finfo(np.float32).tiny)
_HOTTEST = 1 / _COLDEST
_LARGEST_INT = np.iinfo(np.int32).max


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; values are traced, so that changing them does not recompile.

    Values are scalars, or there is one per sequence.

    Attributes:
        temperature: > 0; not read when greedy. Of rows also 0: the row's distribution has all its mass on the most
            likely token, which drafting, accepting and resampling then take for sure.
        top_k: number of tokens kept; the vocabulary size or more keeps all.
        top_p: in (0, 1]; the smallest set of most likely tokens whose mass reaches it is kept.
        greedy: static; take the most likely token.
        filtered: static; whether top_k or top_p does anything (skips looking for what they keep otherwise).
        min_p: in [0, 1], or None for 0: tokens less likely than this share of the most likely one are dropped first.
        with_q: static; language models that draft greedily tell their distributions all the same.
    """

    temperature: Float[Array, "..."]
    top_k: Int[Array, "..."]
    top_p: Float[Array, "..."]
    min_p: Float[Array, "..."] | None = None
    greedy: bool = field(metadata={"static": True})
    filtered: bool = field(metadata={"static": True})
    with_q: bool = field(default=False, metadata={"static": True})


def sampling(temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> Sampling:
    """Checks user values and builds a `Sampling`.

    Args:
        temperature: 0 is greedy decoding; any positive number, however small, samples.
        top_k: 0 keeps the whole vocabulary, and so does its size or more.
        top_p: 1.0 keeps the whole vocabulary.
    Raises:
        ConfigError: a value is out of range or no number.
    """
    temperature, top_p = _number("temperature", temperature), _number("top_p", top_p)
    top_k = whole("top_k", top_k)
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"{temperature=}: must be 0 (greedy) or a positive number")
    if top_k < 0:
        raise ConfigError(f"{top_k=}: must be 0 (off) or a number of tokens")
    if not 0 < top_p <= 1:
        raise ConfigError(f"{top_p=}: must be in (0, 1]; 1 is off")
    greedy = temperature == 0
    put = jax.device_put  # of a Python number JAX would compile a conversion
    return Sampling(
        temperature=put(np.float32(1.0 if greedy else min(max(temperature, _COLDEST), _HOTTEST))),
        top_k=put(np.int32(min(top_k or _LARGEST_INT, _LARGEST_INT))),
        # The most likely token reaches the smallest mass that float32 has, as it does any smaller one.
        top_p=put(np.float32(max(top_p, _COLDEST))),
        greedy=greedy,
        filtered=not greedy and (top_k > 0 or top_p < 1),
    )


def _number(name: str, value: Any) -> float:
    try:
        if not isinstance(value, bool | np.bool_ | str | bytes):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f"{name}={value!r}: must be a number")


def probabilities(logits: Float[Array, "... V"], sampling: Sampling) -> Float[Array, "... V"]:
    """The distribution that tokens are drawn from: temperature, min-p, top-k, then top-p, renormalised; float32.

    A token that ties with the k-th best is kept too, as is one that ties with the last of the top-p set.
    """
    # The largest logit becomes exactly 0 before it is divided: afterwards rounding, or infinity, would differ from it.
    logits = logits.astype(jnp.float32)
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    temperature = _along(sampling.temperature, logits)
    by_row = temperature.ndim > 0
    scaled = logits / (jnp.where(temperature > 0, temperature, 1.0) if by_row else temperature)
    if sampling.min_p is not None:
        lowest = jnp.log(_along(sampling.min_p, logits))
        scaled = jnp.where(scaled >= lowest, scaled, -jnp.inf)
    if sampling.filtered:
        top_k, top_p = _along(sampling.top_k, logits), _along(sampling.top_p, logits)
        inside = filters.kept(logits, top_k, top_p, scaled)
        scaled = jnp.where(inside, scaled, -jnp.inf)
    drawn = jax.nn.softmax(scaled, axis=-1)
    if not by_row:
        return drawn
    best = jax.nn.one_hot(most_likely(logits), logits.shape[-1], dtype=jnp.float32)
    return jnp.where(temperature > 0, drawn, best)


def _along(values: Float[Array, "..."] | Int[Array, "..."], logits: Float[Array, "... V"]):
    """One value per sequence, shaped to broadcast against its logits; scalars as they are."""
    return values.reshape(*values.shape, *(1,) * (logits.ndim - 1)) if values.ndim else values


def draw(keys: UInt32[Array, "B 2"], probs: Float[Array, "B V"]) -> Int[Array, "B"]:
    """One token per sequence by the Gumbel trick; rows need not be normalised but must have some mass."""
    return jax.vmap(lambda key, row: jax.random.categorical(key, jnp.log(row)))(
        wrap(keys), probs
    ).astype(jnp.int32)


def choose(
    keys: UInt32[Array, "B 2"], logits: Float[Array, "B V"], sampling: Sampling
) -> Int[Array, "B"]:
    """Next token from target logits: argmax when greedy, else a draw from `probabilities`."""
    if sampling.greedy:
        return most_likely(logits)
    return draw(keys, probabilities(logits, sampling))


def most_likely(logits: Float[Array, "... V"]) -> Int[Array, "..."]:
    """The token of the largest logit, ties to the lower token id."""

    # XLA's CPU backend vectorizes the largest value, not its place: only within the chunk that has it is it looked for.
    width = math.gcd(logits.shape[-1], _CHUNK)

    def by_chunks(logits):
        chunks = logits.reshape(*logits.shape[:-1], -1, width)
        best = jnp.argmax(jnp.max(chunks, axis=-1), axis=-1, keepdims=True)
        chunk = jnp.take_along_axis(chunks, best[..., None], axis=-2)[..., 0, :]
        return (best[..., 0] * width + jnp.argmax(chunk, axis=-1)).astype(jnp.int32)

    def at_once(logits):
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return lax.platform_dependent(logits, cpu=by_chunks, default=at_once)


def log_top_k(
    logits: Float[Array, "... V"], k: int
) -> tuple[Float[Array, "... k"], Int[Array, "... k"]]:
    """The k largest log-probabilities, descending, ties to the lower token id; float32 and int32."""
    values, tokens = lax.top_k(logits.astype(jnp.float32), k)
    return values - jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1, keepdims=True), tokens


def request_keys(seed: int, request_ids) -> UInt32[Array, "B 2"]:
    """Base key of each request; it depends on seed and request id only, never on slot or order."""
    ids = jnp.asarray(request_ids, jnp.uint32)
    base = jax.random.wrap_key_data(jax.device_put(_words(seed)))
    keys = jax.vmap(lambda i: jax.random.fold_in(base, i))(ids)
    return jax.random.key_data(keys)


def _words(seed: int) -> UInt32[np.ndarray, "2"]:
    """A seed's 64 bits, the upper half first; numbers outside 0 .. 2^64 - 1 by their digest, so that all differ."""
    if not 0 <= seed < 2**64:
        data = seed.to_bytes(seed.bit_length() // 8 + 1, "big", signed=True)
        seed = int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
    return np.asarray([seed >> 32, seed & 0xFFFFFFFF], np.uint32)


def fold(
    keys: UInt32[Array, "B 2"], data: Int[Array, "B"] | Int[Array, ""] | int
) -> UInt32[Array, "B 2"]:
    """Derives a key per sequence, e.g. from its position or from the number of a draw within a step."""
    data = jnp.broadcast_to(jnp.asarray(data, jnp.uint32), keys.shape[:1])
    return jax.random.key_data(jax.vmap(jax.random.fold_in)(wrap(keys), data))


def wrap(keys: UInt32[Array, "B 2"]):
    """Raw key words as a typed key array. State holds the words, which slice and scatter like any array."""
    return jax.random.wrap_key_data(keys)
