"""Draft model: a smaller language model with the target's tokenizer drafts a chain (arXiv 2211.17192)."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from specjax.decoding import tree
from specjax.drafters import base, common_vocabulary, draft_model, options
from specjax.drafters import chain as chains
from specjax.models import cache as kv
from specjax.models import layers
from specjax.models.llama import Llama


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LMState:
    """What the draft model knows of each sequence.

    Attributes:
        cache: the draft model's cache; slots 0 .. C - 2 hold the committed text, slot C - 1 may be missing.
        history: tokens of the committed text and the root.
    """

    cache: kv.KVCache
    history: Int[Array, "B S"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LM:
    """Drafts `draft_depth` tokens with `model`.

    After full acceptance the draft model has not seen its own last draft. Each round therefore starts with two rows,
    the token before the root and the root: in the other cases one row is computed again, which costs nothing where
    reading the weights sets the time, and keeps one static shape.
    """

    model: Llama
    draft_depth: int = field(default=4, metadata={"static": True})

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

    def fitted(self, vocab_size: int) -> "LM":
        """The same over a target's vocabulary, whatever the padding of the draft model's own."""
        return replace(self, model=common_vocabulary.fitted(self.model, vocab_size))

    def init(self, target, batch, capacity):
        cache = kv.init(self.model.config, batch, capacity, self.model.dtype)
        return LMState(cache=cache, history=jnp.zeros((batch, capacity), jnp.int32))

    def prefill(self, target, state, chunk):
        out = self.model(layers.causal_block(chunk.tokens, chunk.start), state.cache)
        return LMState(cache=out.cache, history=base.history_of_chunk(state.history, chunk))

    def propose(self, target, cache, state, root, lengths, keys, sampling) -> base.Proposal:
        history = base.history_of_root(state.history, root, lengths)
        last_two = jnp.take_along_axis(history, lengths[:, None] + jnp.arange(-1, 1), axis=1)
        drafts, q, own = chains.draft_chain(
            self.model,
            state.cache,
            layers.causal_block(last_two, lengths - 1),
            self.draft_depth,
            keys,
            sampling,
        )
        return base.Proposal(
            tree=tree.chain(root, drafts),
            q=chains.with_root(q),
            cache=cache,
            state=LMState(cache=own, history=history),
        )

    def commit(self, target, state, lengths, verified):
        history = base.history_of_step(state.history, lengths, verified)
        return LMState(cache=state.cache, history=history)

    def rollback(self, state, lengths, root, features):
        return state


def build(
    target,
    model: str,
    draft_depth: int = 4,
    scheme: str | None = None,
    quantize: str | None = None,
) -> LM:
    """Loads the draft model `model`, under `scheme`, or rounded to `quantize`."""
    options.lengths(target, draft_depth=draft_depth)
    draft = draft_model.load(target, model, scheme, quantize)
    return LM(model=draft.module, draft_depth=draft_depth).fitted(target.config.vocab_size)
