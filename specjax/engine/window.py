"""What is kept of the tokens between two looks besides the tokens: who proposed them, and their log-probabilities."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from specjax.decoding import sampling as sample
from specjax.verify.base import Verified


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LogProbs:
    """The target's log-probabilities, before bias, penalties, temperature and filters.

    Attributes:
        own: of the token itself.
        top: of the most likely ones, descending.
        top_ids: which tokens those are.
    """

    own: Float[Array, "B M"]
    top: Float[Array, "B M k"]
    top_ids: Int[Array, "B M k"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Window:
    """Beside `DecodeState.tokens`, at the same places.

    Attributes:
        drafted: whether a drafter proposed the token.
        logprobs: None where the engine offers none.
    """

    drafted: Bool[Array, "B M"]
    logprobs: LogProbs | None = None


def init(batch: int, width: int, num_logprobs: int | None) -> Window:
    """Room for `width` tokens; `num_logprobs` of the most likely tokens each, None for no log-probabilities at all."""
    logprobs = None
    if num_logprobs is not None:
        logprobs = LogProbs(
            own=jnp.zeros((batch, width), jnp.float32),
            top=jnp.zeros((batch, width, num_logprobs), jnp.float32),
            top_ids=jnp.zeros((batch, width, num_logprobs), jnp.int32),
        )
    return Window(drafted=jnp.zeros((batch, width), bool), logprobs=logprobs)


def of_tokens(
    logits: Float[Array, "B P V"], tokens: Int[Array, "B P"], num_logprobs: int
) -> LogProbs:
    """Log-probabilities of the tokens that follow each row of logits."""
    total = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    own = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0].astype(jnp.float32)
    top, top_ids = sample.log_top_k(logits, num_logprobs)
    return LogProbs(own=own - total, top=top, top_ids=top_ids.astype(jnp.int32))


def record(
    window: Window,
    place: Int[Array, "B"],
    new: Verified,
    logits: Float[Array, "B N V"],
    wanted: Bool[Array, "B"],
) -> Window:
    """Writes a step's tokens at `place`, place + 1, ...; log-probabilities only if a row wants them."""
    column = jnp.arange(new.tokens.shape[1])
    width = window.drafted.shape[1]
    slots = jnp.where(column < new.length[:, None], place[:, None] + column, width)
    rows = jnp.arange(slots.shape[0])[:, None]

    def put(many, values):
        return many.at[rows, slots].set(values, mode="drop")

    drafted = put(window.drafted, column < new.length[:, None] - 1)
    logprobs = window.logprobs
    if logprobs is not None:
        count = logprobs.top.shape[2]

        def written(kept):
            path = jnp.take_along_axis(logits, new.path[..., None], axis=1)
            return jax.tree.map(put, kept, of_tokens(path, new.tokens, count))

        logprobs = lax.cond(jnp.any(wanted), written, lambda kept: kept, logprobs)
    return replace(window, drafted=drafted, logprobs=logprobs)


def record_first(window: Window, token: Int[Array, "B"], logits: Float[Array, "B one V"]) -> Window:
    """Writes the token that a prompt's end yields, at place 0."""
    logprobs = window.logprobs
    if logprobs is not None:
        first = of_tokens(logits, token[:, None], logprobs.top.shape[2])
        logprobs = jax.tree.map(lambda many, one: many.at[:, :1].set(one), logprobs, first)
    return replace(window, drafted=window.drafted.at[:, 0].set(False), logprobs=logprobs)
