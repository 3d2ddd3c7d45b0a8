"""Drafting with Medusa heads: a static tree whose nodes are the r-th best tokens of the heads (arXiv 2401.10774)."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from specjax.checkpoints import heads
from specjax.decoding import tree as trees
from specjax.drafters import base
from specjax.errors import ConfigError
from specjax.files import hub
from specjax.models.medusa import MedusaHeads

# A node is the path of ranks that leads to it: (0, 2) = third best token of head 1 below the best token of head 0.
Choices = tuple[tuple[int, ...], ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class MedusaState:
    """State of the heads for each sequence.

    Attributes:
        feature: the target's final-norm feature at position C - 1.
    """

    feature: Float[Array, "B D"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Medusa:
    """Static trees from Medusa heads.

    Attributes:
        heads: the network.
        choices: nodes without the root, by depth and then by path (see `medusa`).
    """

    heads: MedusaHeads
    choices: Choices = field(metadata={"static": True})

    needs = "final"

    @property
    def num_nodes(self) -> int:
        return len(self.choices) + 1

    @property
    def max_depth(self) -> int:
        return max(len(path) for path in self.choices)

    @property
    def scratch(self) -> int:
        return self.num_nodes

    def following(self, depth: int) -> "Medusa":
        """The same where steps may commit `depth` drafts, its own or others'."""
        return self

    def init(self, target, batch, capacity):
        feature = jnp.zeros((batch, target.config.hidden_size), target.dtype)
        return MedusaState(feature=feature)

    def prefill(self, target, state, chunk):
        last = jnp.maximum(chunk.valid - 1, 0)[:, None, None]
        feature = jnp.take_along_axis(chunk.features, last, axis=1)[:, 0]
        return MedusaState(feature=jnp.where((chunk.valid > 0)[:, None], feature, state.feature))

    def propose(self, target, cache, state, root, lengths, keys, sampling) -> base.Proposal:
        ranks = np.asarray([path[-1] for path in self.choices])
        depths = np.asarray([len(path) for path in self.choices])
        node_of = {(): 0} | {path: i + 1 for i, path in enumerate(self.choices)}
        parents = jnp.asarray([-1] + [node_of[path[:-1]] for path in self.choices], jnp.int32)
        logits = self.heads(state.feature)[:, : self.max_depth]
        best = lax.top_k(logits, int(ranks.max()) + 1)[1].astype(jnp.int32)
        tokens = jnp.concatenate([root[:, None], best[:, depths - 1, ranks]], axis=1)
        tree = trees.Tree(
            tokens=tokens,
            parents=jnp.broadcast_to(parents, tokens.shape),
            max_depth=self.max_depth,
        )
        return base.Proposal(tree=tree, q=None, cache=cache, state=state)

    def commit(self, target, state, lengths, verified):
        last = jnp.maximum(verified.length - 1, 0)[:, None, None]
        feature = jnp.take_along_axis(verified.features, last, axis=1)[:, 0]
        return MedusaState(
            feature=jnp.where((verified.length > 0)[:, None], feature, state.feature)
        )

    def rollback(self, state, lengths, root, features):
        return MedusaState(feature=features)


def medusa(heads: MedusaHeads, choices) -> Medusa:
    """Checks a tree given as paths of ranks, and builds the drafter.

    Raises:
        ConfigError: a path is deeper than there are heads, lacks its parent, or occurs twice.
    """
    paths = sorted({tuple(path) for path in choices}, key=lambda path: (len(path), path))
    known = {(), *paths}
    if len(paths) != len(choices) or not paths:
        raise ConfigError("medusa choices: paths must be distinct and at least one is needed")
    for path in paths:
        if path[:-1] not in known:
            raise ConfigError(f"medusa choices: {list(path)} lacks its parent {list(path[:-1])}")
        if len(path) > len(heads.heads):
            raise ConfigError(
                f"medusa choices: {list(path)} is deeper than the {len(heads.heads)} heads"
            )
    return Medusa(heads=heads, choices=tuple(paths))


def default_choices(num_heads: int, num_nodes: int = 24, topk: int = 6) -> Choices:
    """A tree where none is given: the `num_nodes - 1` paths of smallest rank sums, more weight on deeper heads."""
    paths: list[tuple[int, ...]] = []
    frontier: list[tuple[int, ...]] = [()]
    for _ in range(num_heads):
        frontier = [(*path, rank) for path in frontier for rank in range(topk)]
        frontier = [path for path in frontier if _cost(path) < num_nodes]
        paths.extend(frontier)
    return tuple(sorted(paths, key=lambda path: (_cost(path), path))[: num_nodes - 1])


def _cost(path: tuple[int, ...]) -> int:
    """Rises along a path and with rank, so that the cheapest nodes form a tree."""
    cost = 1
    for depth, rank in enumerate(path):
        cost *= 1 + rank * (1 + depth) + depth
    return cost + len(path)


def build(target, model: str, tree: str | list | None = None) -> Medusa:
    """Loads the heads; `tree` is a name in their medusa_choices.json or a list of rank paths."""
    loaded, named = heads.load_medusa(hub.resolve(model), target.module)
    if isinstance(tree, str) and tree not in named:
        raise ConfigError(
            f"medusa tree={tree!r}: medusa_choices.json of {model} has {', '.join(named) or 'none'}"
        )
    choices = named[tree] if isinstance(tree, str) else tree
    return medusa(loaded, choices or default_choices(len(loaded.heads)))
