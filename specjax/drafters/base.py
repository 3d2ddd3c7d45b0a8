"""The Drafter interface: who proposes trees, and what it must keep in step with the target.

One step of the engine is propose, verify, accept, commit. A drafter is a pytree (its own model's parameters are leaves,
its settings static) without any array of the target: `target` and the target's `cache` are handed to it. Its state is a
pytree whose arrays all have the batch as leading axis, so that a finished sequence's slot can be refilled, and whose
structure, shapes and dtypes no method changes.

Conventions, with C = `lengths` = tokens of a sequence that are committed in the target's cache:
the root is the token at position C, not yet in any cache; a step that returns `length` tokens moves C by `length`.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from specjax.decoding.sampling import Sampling
from specjax.decoding.tree import Tree
from specjax.models.cache import KVCache
from specjax.models.llama import Llama
from specjax.verify.base import Verified

# What a drafter wants of the target's passes: nothing, the rows after the final norm, or the inputs of named layers.
Needs = None | Literal["final"] | tuple[int, ...]
State = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A piece of prompts that the target has just processed.

    Attributes:
        tokens: prompt tokens at positions start .. start + T - 1.
        next_tokens: the token after each of them; junk at a prompt's last position, where it is not known yet.
        start: position of the first column.
        valid: columns of this chunk that belong to the prompt; the others are padding.
        features: what the drafter `needs` of the target for these tokens, or None.
    """

    tokens: Int[Array, "B T"]
    next_tokens: Int[Array, "B T"]
    start: Int[Array, "B"]
    valid: Int[Array, "B"]
    features: Float[Array, "B T D"] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A drafted tree.

    Attributes:
        tree: rooted at the last committed token.
        q: filtered draft distribution that each node was drawn from; None for point masses (deterministic candidates).
        cache: the target's cache; slots from C on may have been used as scratch.
        state: the drafter's state.
        chances: how likely the drafter thinks each node is kept; None: it does not say.
    """

    tree: Tree
    q: Float[Array, "B N V"] | None
    cache: KVCache
    state: State
    chances: Float[Array, "B N"] | None = None


class Drafter(Protocol):
    """See the module docstring. `specjax.drafters.none.NoDraft` is the shortest example."""

    @property
    def needs(self) -> Needs:
        """Features it wants in `Chunk.features` and `Verified.features`."""

    @property
    def num_nodes(self) -> int:
        """Nodes of its trees, root included."""

    @property
    def max_depth(self) -> int:
        """Depth of its deepest node; a step commits at most max_depth + 1 tokens."""

    @property
    def scratch(self) -> int:
        """Slots from C on that it or the verification may write in any cache of `capacity` slots."""

    def init(self, target: Llama, batch: int, capacity: int) -> State:
        """State for `batch` empty sequences."""

    def prefill(self, target: Llama, state: State, chunk: Chunk) -> State:
        """Takes in a piece of the prompts."""

    def propose(
        self,
        target: Llama,
        cache: KVCache,
        state: State,
        root: Int[Array, "B"],
        lengths: Int[Array, "B"],
        keys: UInt32[Array, "B 2"],
        sampling: Sampling,
    ) -> Proposal:
        """Drafts a tree below `root`; `keys` are this step's, one per sequence."""

    def commit(self, target: Llama, state: State, lengths: Int[Array, "B"], verified: Verified):
        """Takes in what was accepted; `lengths` are those before the step. Rows with length 0 stay as they are."""

    def rollback(
        self,
        state: State,
        lengths: Int[Array, "B"],
        root: Int[Array, "B"],
        features: Float[Array, "B D"] | None,
    ) -> State:
        """Shortens the text to `lengths` tokens followed by `root`.

        Called where an outer target rejects what an inner engine had committed; never lengthens.

        Args:
            features: what the drafter `needs` at position lengths - 1.
        """


@runtime_checkable
class TwoLevel(Protocol):
    """A drafter that verifies drafts of its own; what it has besides the methods of `Drafter`."""

    def inner_acceptance(self, state: State) -> Int[Array, "B P"]:
        """Inner rounds of all committed steps, by number of accepted drafts."""


def history_of_chunk(history: Int[Array, "B S"], chunk: Chunk) -> Int[Array, "B S"]:
    """A token history (position -> token) extended by a piece of the prompts."""
    return _history_write(history, chunk.tokens, chunk.start, chunk.valid)


def history_of_root(
    history: Int[Array, "B S"], root: Int[Array, "B"], lengths: Int[Array, "B"]
) -> Int[Array, "B S"]:
    """A token history with the root at its position."""
    return _history_write(history, root[:, None], lengths, jnp.ones_like(lengths))


def history_of_step(
    history: Int[Array, "B S"], lengths: Int[Array, "B"], verified: Verified
) -> Int[Array, "B S"]:
    """A token history extended by the tokens of a step, which follow the root."""
    return _history_write(history, verified.tokens, lengths + 1, verified.length)


def _history_write(history, rows, start, valid):
    """Writes the first `valid` columns of `rows` at start, start + 1, ..."""
    column = jnp.arange(rows.shape[1])
    slots = jnp.where(column < valid[:, None], start[:, None] + column, history.shape[1])
    return history.at[jnp.arange(rows.shape[0])[:, None], slots].set(rows, mode="drop")
