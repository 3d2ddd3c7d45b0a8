"""The draft-verify loop: one compiled `lax.while_loop` per generation.

A step proposes a tree, lets the target score it in one pass, keeps a path, and moves the path's cache rows into place.
Plain decoding is the same loop with the empty drafter. Streaming and stop strings run the same loop in pieces of
`max_steps` steps.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from specjax.decoding import adjust
from specjax.decoding import sampling as sample
from specjax.decoding import target as target_pass
from specjax.decoding import tree as trees
from specjax.decoding.sampling import Sampling
from specjax.drafters.base import Chunk, Drafter
from specjax.engine import rows as requests
from specjax.engine import trace as tracing
from specjax.engine import window as windows
from specjax.engine.window import Window
from specjax.models import cache as kv
from specjax.models.llama import Llama
from specjax.verify.base import Acceptor, Verified


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DecodeState:
    """State of a batch of generations. Every array has the batch as leading axis, so a slot can be refilled.

    Attributes:
        cache: the target's keys and values.
        draft: the drafter's state.
        lengths: tokens committed in the cache, prompt included, root excluded = the root's position.
        root: last token so far; not in the cache yet.
        tokens: tokens generated so far, the stop token included; junk from `num_tokens` on.
        num_tokens: tokens generated so far.
        limit: tokens the request may receive; at most M - P.
        done: the request has ended (stop token or limit); its slot idles.
        stopped: it ended at a stop token.
        keys: base random key of the request.
        num_spec_steps: steps so far (the token that prefill yields is not one).
        num_draft_tokens: drafted tokens so far, roots excluded.
        acceptance_histogram: steps by number of accepted drafts (bonus excluded), before cutting at a stop token.
        trace: record of every step, or None where none is kept.
        rows: what each request asks for, where requests differ (see `engine.slots`); else None.
        window: what is kept of each token besides itself, or None.
    """

    cache: kv.KVCache
    draft: Any
    lengths: Int[Array, "B"]
    root: Int[Array, "B"]
    tokens: Int[Array, "B M"]
    num_tokens: Int[Array, "B"]
    limit: Int[Array, "B"]
    done: Bool[Array, "B"]
    stopped: Bool[Array, "B"]
    keys: UInt32[Array, "B 2"]
    num_spec_steps: Int[Array, "B"]
    num_draft_tokens: Int[Array, "B"]
    acceptance_histogram: Int[Array, "B P"]
    trace: tracing.Trace | None = None
    rows: requests.Rows | None = None
    window: Window | None = None


def init_state(
    target: Llama,
    drafter: Drafter,
    batch: int,
    capacity: int,
    max_new_tokens: int,
    trace: bool = False,
) -> DecodeState:
    """An idle batch: all slots done, caches empty, room for `max_new_tokens` tokens each; `trace` keeps a record."""
    path_rows = drafter.max_depth + 1

    def zeros(*shape):
        return jnp.zeros((batch, *shape), jnp.int32)

    return DecodeState(
        cache=kv.init(target.config, batch, capacity, target.dtype),
        draft=drafter.init(target, batch, capacity),
        lengths=zeros(),
        root=zeros(),
        tokens=zeros(max_new_tokens + path_rows),
        num_tokens=zeros(),
        limit=zeros(),
        done=jnp.ones((batch,), bool),
        stopped=jnp.zeros((batch,), bool),
        keys=jnp.zeros((batch, 2), jnp.uint32),
        num_spec_steps=zeros(),
        num_draft_tokens=zeros(),
        acceptance_histogram=zeros(path_rows),
        trace=tracing.init(batch, max_new_tokens, drafter.num_nodes, path_rows) if trace else None,
    )


def prefill_chunk(
    target: Llama,
    drafter: Drafter,
    state: DecodeState,
    chunk: Chunk,
    prompt_len: Int[Array, "B"],
    stop_ids: Int[Array, "E"] | Int[Array, "B E"],
    sampling: Sampling,
) -> DecodeState:
    """Takes in one piece of the prompts; where a prompt ends in it, its first token is chosen.

    Args:
        chunk: tokens, next_tokens, start and valid; `features` is filled in here.
        prompt_len: tokens of each prompt.
        stop_ids: token ids that end a request; -1 matches nothing.
    """
    state, hidden = absorb(target, drafter, state, chunk, prompt_len)
    first = sample.choose(sample.fold(state.keys, prompt_len), target.logits(hidden), sampling)
    ends_here = (chunk.valid > 0) & (chunk.start + chunk.valid == prompt_len)
    return begin(state, ends_here, prompt_len, first, stop_ids)


def absorb(
    target: Llama,
    drafter: Drafter,
    state: DecodeState,
    chunk: Chunk,
    prompt_len: Int[Array, "B"],
    every: bool = False,
) -> tuple[DecodeState, Float[Array, "B ..."]]:
    """Takes a piece of the prompts into the caches; returns the row at its last valid token, or `every` row."""
    out, features = target_pass.forward_chunk(
        *(target, chunk.tokens, chunk.start, state.cache, drafter.needs), length=prompt_len
    )
    draft = drafter.prefill(target, state.draft, replace(chunk, features=features))
    state = replace(state, cache=out.cache, draft=draft)
    if every:
        return state, out.hidden
    last = jnp.maximum(chunk.valid - 1, 0)
    return state, jnp.take_along_axis(out.hidden, last[:, None, None], axis=1)[:, 0]


def begin(state: DecodeState, begins, prompt_len, first, stop_ids) -> DecodeState:
    """Starts decoding where `begins`: the prompt is committed and `first` is the root and the first output token."""
    stopped = _ends(first[:, None], stop_ids)[:, 0]
    done = stopped | (state.limit <= 1)

    def where(new, old):
        return jnp.where(begins, new, old)

    return replace(
        state,
        lengths=where(prompt_len, state.lengths),
        root=where(first, state.root),
        tokens=state.tokens.at[:, 0].set(where(first, state.tokens[:, 0])),
        num_tokens=where(1, state.num_tokens),
        done=where(done, state.done),
        stopped=where(stopped, state.stopped),
    )


def _ends(tokens: Int[Array, "B P"], stop_ids: Int[Array, "E"] | Int[Array, "B E"]):
    """Which tokens end their request; ids are the same for all or by row."""
    ids = stop_ids if stop_ids.ndim == 1 else stop_ids[:, None]
    return jnp.any(tokens[..., None] == ids, axis=-1)


def step(
    target: Llama,
    drafter: Drafter,
    state: DecodeState,
    stop_ids: Int[Array, "E"] | Int[Array, "B E"],
    sampling: Sampling,
    acceptor: Acceptor,
) -> DecodeState:
    """One propose - verify - accept - commit cycle for all running sequences."""
    # The root's position names the step, so a request draws the same numbers in any slot and any batch.
    keys = sample.fold(state.keys, state.lengths + 1)
    with jax.named_scope("propose"):
        proposal = drafter.propose(
            target,
            state.cache,
            state.draft,
            state.root,
            state.lengths,
            sample.fold(keys, 0),
            sampling,
        )
    if state.rows is not None:
        proposal = replace(proposal, tree=requests.cut(state.rows, proposal.tree))
    with jax.named_scope("verify"):
        # Which layers the text so far ran through is known by its verification only, not by drafts of the target.
        cache = replace(proposal.cache, depth=state.cache.depth)
        logits, features, cache, tree = target_pass.forward_tree(
            target, proposal.tree, cache, state.lengths, drafter.needs, live=~state.done
        )
    with jax.named_scope("accept"):
        q = proposal.q
        if q is not None and tree.kept is not None:
            q = jnp.take_along_axis(q, tree.kept[..., None], axis=1)
        judged = logits
        if state.rows is not None:
            judged = adjust.adjusted(logits, state.rows.adjustments, tree)
        accepted = acceptor(tree, q, judged, sample.fold(keys, 1), sampling)
        running = replace(accepted, length=jnp.where(state.done, 0, accepted.length))
    with jax.named_scope("commit"):
        if not tree.is_chain:
            cache = kv.compact(cache, state.lengths, accepted.path, target.backend)
        if features is not None:
            rows = jnp.take_along_axis(features, accepted.path[..., None], axis=1)
            running = replace(running, features=rows)
        draft = drafter.commit(target, proposal.state, state.lengths, running)
    state = replace(state, cache=cache, draft=draft)
    if state.trace is not None:
        kept = tracing.record(state.trace, state.num_spec_steps, tree, running)
        state = replace(state, trace=kept)
    if state.window is not None:
        wanted = ~state.done & state.rows.wants_logprobs
        seen = windows.record(state.window, state.num_tokens, running, logits, wanted)
        state = replace(state, window=seen)
    return _emit(state, running, trees.num_draft_tokens(tree), stop_ids)


def _emit(state: DecodeState, new: Verified, num_drafted, stop_ids) -> DecodeState:
    """Appends the tokens of a step to the outputs, up to the first stop token or the request's limit."""
    column = jnp.arange(new.tokens.shape[1])
    is_stop = _ends(new.tokens, stop_ids) & (column < new.length[:, None])
    any_stop = jnp.any(is_stop, axis=1)
    upto_stop = jnp.where(any_stop, jnp.argmax(is_stop, axis=1) + 1, new.length)
    count = jnp.minimum(upto_stop, state.limit - state.num_tokens)
    count = jnp.where(state.done, 0, count).astype(jnp.int32)
    stopped = ~state.done & any_stop & (upto_stop <= count)
    slots = jnp.where(
        column < count[:, None], state.num_tokens[:, None] + column, state.tokens.shape[1]
    )
    rows = jnp.arange(slots.shape[0])[:, None]
    active = (~state.done).astype(jnp.int32)
    accepted = jax.nn.one_hot(new.length - 1, column.shape[0], dtype=jnp.int32)
    num_tokens = state.num_tokens + count
    if state.rows is not None:
        counts = adjust.generated(state.rows.adjustments, new.tokens, count)
        adjustments = replace(state.rows.adjustments, counts=counts)
        state = replace(state, rows=replace(state.rows, adjustments=adjustments))
    return replace(
        state,
        lengths=state.lengths + new.length,
        root=jnp.where(state.done, state.root, new.next_token),
        tokens=state.tokens.at[rows, slots].set(new.tokens, mode="drop"),
        num_tokens=num_tokens,
        done=state.done | stopped | (num_tokens >= state.limit),
        stopped=state.stopped | stopped,
        num_spec_steps=state.num_spec_steps + active,
        num_draft_tokens=state.num_draft_tokens + num_drafted * active,
        acceptance_histogram=state.acceptance_histogram + accepted * active[:, None],
    )


def decode(
    target: Llama,
    drafter: Drafter,
    state: DecodeState,
    stop_ids: Int[Array, "E"] | Int[Array, "B E"],
    max_steps: Int[Array, ""],
    sampling: Sampling,
    acceptor: Acceptor,
) -> DecodeState:
    """Steps until every request has ended, or for `max_steps` steps."""

    def unfinished(carry):
        count, state = carry
        return (count < max_steps) & ~jnp.all(state.done)

    def body(carry):
        count, state = carry
        return count + 1, step(target, drafter, state, stop_ids, sampling, acceptor)

    return lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]


def insert(batch: DecodeState, slot: Int[Array, ""], single: DecodeState) -> DecodeState:
    """Puts a prefilled request (a state of batch 1, same capacity) into a slot of a running batch."""

    def put(many, one):
        return lax.dynamic_update_index_in_dim(many, one[0], slot, 0)

    return jax.tree.map(put, batch, single)
