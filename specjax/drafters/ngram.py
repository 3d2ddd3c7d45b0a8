"""Prompt lookup: the tokens that followed the last occurrence of the present n-gram are the draft.

Useful where the answer repeats the prompt (summaries, extraction, code edits); it costs no model.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from specjax.decoding import tree
from specjax.drafters import base, options
from specjax.errors import ConfigError


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class NgramState:
    """Attributes:
    history: all tokens of each sequence, prompt and committed ones; junk beyond the committed length.
    """

    history: Int[Array, "B S"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Ngram:
    """Looks up the longest suffix of `ngram_max` .. `ngram_min` tokens, its latest earlier occurrence first.

    Attributes:
        draft_depth: length of the chain that is copied (fewer where the match lies near the end).
        ngram_max: longest suffix tried.
        ngram_min: shortest suffix tried.
    """

    draft_depth: int = field(default=7, metadata={"static": True})
    ngram_max: int = field(default=4, metadata={"static": True})
    ngram_min: int = field(default=2, metadata={"static": True})

    needs = None

    @property
    def num_nodes(self) -> int:
        return self.draft_depth + 1

    @property
    def max_depth(self) -> int:
        return self.draft_depth

    @property
    def scratch(self) -> int:
        return self.num_nodes

    def following(self, depth: int) -> "Ngram":
        """The same where steps may commit `depth` drafts, its own or others'."""
        return self

    def init(self, target, batch, capacity):
        return NgramState(history=jnp.zeros((batch, capacity), jnp.int32))

    def prefill(self, target, state, chunk):
        return NgramState(history=base.history_of_chunk(state.history, chunk))

    def propose(self, target, cache, state, root, lengths, keys, sampling) -> base.Proposal:
        history = base.history_of_root(state.history, root, lengths)
        text_len = lengths + 1
        begin, found = self._latest_match(history, text_len)
        index = jnp.minimum(begin[:, None] + jnp.arange(self.draft_depth), history.shape[1] - 1)
        drafts = jnp.take_along_axis(history, index, axis=1)
        count = jnp.where(found, jnp.minimum(text_len - begin, self.draft_depth), 0)
        return base.Proposal(
            tree=tree.chain(root, drafts, count, often_empty=True),
            q=None,
            cache=cache,
            state=NgramState(history=history),
        )

    def _latest_match(
        self, history: Int[Array, "B S"], text_len: Int[Array, "B"]
    ) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
        """Position after the best earlier occurrence of the text's suffix, and whether there is one."""
        capacity = history.shape[1]
        ends = jnp.arange(1, capacity + 1)
        # matched[b, e] = length of the common suffix of text[:e] and the whole text, up to ngram_max.
        matched = jnp.zeros(history.shape, jnp.int32)
        alive = jnp.broadcast_to(ends < text_len[:, None], history.shape)
        for back in range(self.ngram_max):
            last = jnp.take_along_axis(
                history, jnp.maximum(text_len - 1 - back, 0)[:, None], axis=1
            )
            shifted = jnp.pad(history, ((0, 0), (back, 0)), constant_values=-1)[:, :capacity]
            alive = alive & (shifted == last) & (text_len > back + 1)[:, None]
            matched = matched + alive.astype(jnp.int32)
        best = jnp.max(matched, axis=1)
        # Among the longest matches the latest one: texts drift, recent text predicts better.
        score = jnp.where(matched == best[:, None], ends, 0)
        return jnp.max(score, axis=1), best >= self.ngram_min

    def commit(self, target, state, lengths, verified):
        return NgramState(history=base.history_of_step(state.history, lengths, verified))

    def rollback(self, state, lengths, root, features):
        return state


def build(target, draft_depth: int = 7, ngram_max: int = 4, ngram_min: int = 2) -> Ngram:
    """Checked options to a drafter."""
    options.lengths(target, draft_depth=draft_depth, ngram_min=ngram_min, ngram_max=ngram_max)
    if ngram_max < ngram_min:
        raise ConfigError(f"{ngram_max=} is below {ngram_min=}")
    return Ngram(draft_depth=draft_depth, ngram_max=ngram_max, ngram_min=ngram_min)
