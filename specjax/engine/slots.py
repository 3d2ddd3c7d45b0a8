"""Slots: a running batch that requests enter and leave, by programs whose shapes no request decides.

A slot that is being filled is a done slot whose `lengths` are the prompt tokens taken in so far and whose `root` is the
next prompt token. What decoding writes for it meanwhile lies behind its text, and the entry that a drafter rewrites is
the one that it already holds; so prompts go in piece by piece between steps of the others, and no drafter knows.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, UInt32

from specjax.decoding import adjust
from specjax.decoding import sampling as sample
from specjax.drafters.base import Chunk, Drafter
from specjax.engine import decode as decoding
from specjax.engine import rows as requests
from specjax.engine import window as windows
from specjax.engine.decode import DecodeState
from specjax.engine.window import LogProbs, Window
from specjax.models.llama import Llama
from specjax.verify.base import Acceptor


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What `take_in` needs to know of a request beside its tokens.

    Attributes:
        row: its row, see `rows.row`.
        key: base random key.
        length: tokens of the whole prompt.
        limit: most tokens to generate.
        begins: this is the first chunk that is taken in for the request (which `start` is not where a prefix was
            already there).
    """

    row: dict[str, Array]
    key: UInt32[Array, "2"]
    length: Int[Array, ""]
    limit: Int[Array, ""]
    begins: Bool[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Piece:
    """What some steps added: arrays of their own, which no later call takes away.

    Attributes:
        tokens: new tokens of each slot.
        num_tokens: how many they are.
        window: what is known of each.
        done, stopped, num_spec_steps, num_draft_tokens, acceptance_histogram: as in `DecodeState`.
    """

    tokens: Int[Array, "B M"]
    num_tokens: Int[Array, "B"]
    window: Window
    done: Bool[Array, "B"]
    stopped: Bool[Array, "B"]
    num_spec_steps: Int[Array, "B"]
    num_draft_tokens: Int[Array, "B"]
    acceptance_histogram: Int[Array, "B P"]


def init_state(
    target: Llama,
    drafter: Drafter,
    *,
    batch: int,
    capacity: int,
    max_steps: int,
    num_stop_ids: int,
    num_biased: int,
    num_logprobs: int | None,
) -> DecodeState:
    """Idle slots with room for what `max_steps` steps and a prompt's end add."""
    width = max_steps * (drafter.max_depth + 1) + 1
    state = decoding.init_state(target, drafter, batch, capacity, width)
    return replace(
        state,
        rows=requests.idle(batch, target.config.vocab_size, num_stop_ids, num_biased),
        window=windows.init(batch, state.tokens.shape[1], num_logprobs),
    )


def take_in(
    target: Llama,
    drafter: Drafter,
    *,
    state: DecodeState,
    slot: Int[Array, ""],
    chunk: Chunk,
    prompt: Prompt,
    score: bool,
) -> tuple[DecodeState, LogProbs | None]:
    """Takes one chunk of a prompt into its slot; where the prompt ends, its first token is chosen.

    Args:
        chunk: of batch 1; `next_tokens` are known up to the prompt's last token. It begins where the slot's text ends.
        score: static; also return log-probabilities of `next_tokens`.
    """
    single = _begun(target, drafter, _taken(state, slot), chunk, prompt)
    length = prompt.length[None]
    if score:
        single, rows = decoding.absorb(target, drafter, single, chunk, length, every=True)
        logits = target.logits(rows)
        count = state.window.logprobs.top.shape[2]
        scores = windows.of_tokens(logits, chunk.next_tokens, count)
        last = jnp.take_along_axis(logits, (chunk.valid - 1)[:, None, None], axis=1)
    else:
        single, row = decoding.absorb(target, drafter, single, chunk, length)
        last, scores = target.logits(row)[:, None], None
    so_far = chunk.start + chunk.valid
    following = jnp.take_along_axis(chunk.next_tokens, (chunk.valid - 1)[:, None], axis=1)[:, 0]
    filling = replace(single, lengths=so_far, root=following)
    ended = _first_token(single, last, length)
    ends = so_far == length
    single = jax.tree.map(
        lambda a, b: a if a is b else jnp.where(_like(ends, a), a, b), ended, filling
    )
    return _put(state, slot, single), scores


def _begun(target, drafter, single: DecodeState, chunk: Chunk, prompt: Prompt) -> DecodeState:
    """The slot's state before a chunk: a new request's row and counters, and an empty drafter where its text begins."""
    begins, fresh = prompt.begins, chunk.start[0] == 0
    rows = requests.placed(single.rows, prompt.row)
    rows = jax.tree.map(lambda new, old: jnp.where(begins, new, old), rows, single.rows)
    draft = jax.tree.map(
        lambda new, old: jnp.where(fresh, new, old),
        drafter.init(target, 1, single.cache.capacity),
        single.draft,
    )
    seen = adjust.prompted(rows.adjustments, chunk.tokens, chunk.valid)
    rows = replace(rows, adjustments=replace(rows.adjustments, in_prompt=seen))
    cache = single.cache
    if cache.depth is not None:
        runs = jnp.where(begins, 0, cache.depth.runs)
        cache = replace(cache, depth=replace(cache.depth, runs=runs))

    def cleared(counter):
        return jnp.where(begins, jnp.zeros_like(counter), counter)

    return replace(
        single,
        cache=cache,
        draft=draft,
        rows=rows,
        num_tokens=jnp.zeros_like(single.num_tokens),
        limit=prompt.limit[None],
        keys=prompt.key[None],
        done=jnp.ones_like(single.done),
        stopped=jnp.zeros_like(single.stopped),
        num_spec_steps=cleared(single.num_spec_steps),
        num_draft_tokens=cleared(single.num_draft_tokens),
        acceptance_histogram=cleared(single.acceptance_histogram),
    )


def _first_token(single: DecodeState, logits, length) -> DecodeState:
    """The state of a slot whose prompt ends: `logits` [1, 1, V] choose its first token."""
    rows = single.rows
    judged = adjust.adjusted(logits, rows.adjustments)[:, 0]
    first = sample.choose(sample.fold(single.keys, length), judged, rows.sampling(greedy=False))
    one = jnp.ones_like(length)
    counts = adjust.generated(rows.adjustments, first[:, None], one)
    window = windows.record_first(single.window, first, logits)
    single = replace(
        single,
        window=window,
        rows=replace(rows, adjustments=replace(rows.adjustments, counts=counts)),
    )
    return decoding.begin(single, one > 0, length, first, rows.stop_ids)


def decode(
    target: Llama,
    drafter: Drafter,
    *,
    state: DecodeState,
    max_steps: Int[Array, ""],
    acceptor: Acceptor,
    greedy: bool,
) -> tuple[DecodeState, Piece]:
    """Up to `max_steps` steps of all slots that run.

    Args:
        greedy: static promise that all of them are; saves the softmax of the vocabulary.
    """
    rows = state.rows
    state = decoding.decode(
        target, drafter, state, rows.stop_ids, max_steps, rows.sampling(greedy), acceptor
    )
    names = (*("tokens", "num_tokens", "window", "done", "stopped"),)
    names += ("num_spec_steps", "num_draft_tokens", "acceptance_histogram")
    piece = Piece(**{name: getattr(state, name) for name in names})
    limit = state.limit - state.num_tokens
    return replace(state, limit=limit, num_tokens=jnp.zeros_like(limit)), piece


def copy_slot(state: DecodeState, source: Int[Array, ""], to: Int[Array, ""]) -> DecodeState:
    """Another slot gets what one holds, idle; what is then taken in from a shared prefix on finds it there."""
    single = _taken(state, source)
    return _put(state, to, replace(single, done=jnp.ones_like(single.done)))


def release(state: DecodeState, mask: Bool[Array, "B"]) -> DecodeState:
    """Ends the requests of some slots; their text stays readable for `copy_slot`."""
    return replace(state, done=state.done | mask)


def _like(flag, array):
    return flag.reshape(-1, *(1,) * (array.ndim - 1))


def _taken(state: DecodeState, slot) -> DecodeState:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, slot, 1, 0), state)


def _put(state: DecodeState, slot, single: DecodeState) -> DecodeState:
    def put(many, one):
        return lax.dynamic_update_slice_in_dim(many, one, slot, 0)

    return jax.tree.map(put, state, single)
