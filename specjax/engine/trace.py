"""What every step of a generation drafted, accepted and added: recorded on the device, on request only."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from specjax.decoding.tree import Tree
from specjax.verify.base import Verified


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Trace:
    """Records of up to M steps per sequence.

    Attributes:
        tokens: nodes of each step's tree.
        parents: of those nodes; -1 for the root and for unused nodes.
        path: accepted nodes, root first; any node from `length` on.
        length: accepted nodes, the root included.
        next_token: the token that the target added.
    """

    tokens: Int[Array, "B M N"]
    parents: Int[Array, "B M N"]
    path: Int[Array, "B M P"]
    length: Int[Array, "B M"]
    next_token: Int[Array, "B M"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of one request, before anything is cut at a stop token or limit.

    Attributes:
        drafted: tokens of the drafted nodes, the root excluded.
        parents: index in `drafted` of each one's parent; -1 below the root.
        accepted: drafted tokens that were kept, in order.
        token: what the target added.
        kind: "bonus" where nothing was drafted below the last accepted token, else "resampled".
        drafted_text, accepted_text, token_text: the same token by token, where there is a tokenizer.
    """

    drafted: tuple[int, ...]
    parents: tuple[int, ...]
    accepted: tuple[int, ...]
    token: int
    kind: Literal["bonus", "resampled"]
    drafted_text: tuple[str, ...] | None = None
    accepted_text: tuple[str, ...] | None = None
    token_text: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; texts only where they are known."""
        return {name: value for name, value in vars(self).items() if value is not None}


def init(batch: int, num_steps: int, num_nodes: int, path_rows: int) -> Trace:
    """Room for `num_steps` steps with trees of `num_nodes` nodes and paths of `path_rows` rows."""

    def zeros(*shape):
        return jnp.zeros((batch, num_steps, *shape), jnp.int32)

    return Trace(
        tokens=zeros(num_nodes),
        parents=zeros(num_nodes),
        path=zeros(path_rows),
        length=zeros(),
        next_token=zeros(),
    )


def record(trace: Trace, step: Int[Array, "B"], tree: Tree, new: Verified) -> Trace:
    """Writes a step at index `step` of the sequences that take part in it (`new.length` > 0)."""
    rows = jnp.arange(step.shape[0])
    slot = jnp.where(new.length > 0, step, trace.length.shape[1])
    # Of a tree that the target has pruned, only what it verified; the rest of the record says that it is unused.
    spare = ((0, 0), (0, trace.tokens.shape[2] - tree.num_nodes))

    def put(many, one):
        return many.at[rows, slot].set(one, mode="drop")

    return Trace(
        tokens=put(trace.tokens, jnp.pad(tree.tokens, spare)),
        parents=put(trace.parents, jnp.pad(tree.parents, spare, constant_values=-1)),
        path=put(trace.path, new.path),
        length=put(trace.length, new.length),
        next_token=put(trace.next_token, new.next_token),
    )


def steps(trace: Trace, row: int, count: int) -> tuple[Step, ...]:
    """The first `count` steps of a sequence."""
    one = jax.tree.map(lambda leaf: np.asarray(leaf[row, :count]), trace)
    return tuple(_step(one, index) for index in range(count))


def _step(one: Trace, index: int) -> Step:
    tokens, parents = one.tokens[index], one.parents[index]
    nodes = [int(node) for node in np.flatnonzero(parents >= 0) if node > 0]
    place = {0: -1} | {node: i for i, node in enumerate(nodes)}
    path = one.path[index, : one.length[index]].tolist()
    has_child = any(parents[node] == path[-1] for node in nodes)
    return Step(
        drafted=tuple(int(tokens[node]) for node in nodes),
        parents=tuple(place[int(parents[node])] for node in nodes),
        accepted=tuple(int(tokens[node]) for node in path[1:]),
        token=int(one.next_token[index]),
        kind="resampled" if has_child else "bonus",
    )


def with_text(found: tuple[Step, ...], piece: Callable[[int], str]) -> tuple[Step, ...]:
    """The steps with their tokens as text; `piece` gives that of one token within a text."""

    def texts(ids):
        return tuple(piece(i) for i in ids)

    return tuple(
        Step(
            **{
                **vars(step),
                "drafted_text": texts(step.drafted),
                "accepted_text": texts(step.accepted),
                "token_text": piece(step.token),
            }
        )
        for step in found
    )
