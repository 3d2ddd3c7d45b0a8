"""Token-adaptive depth at inference: a router in front of each layer says which tokens run through it (D-LLM).

A token that skips a layer keeps its residual stream and leaves no key and value there. Over a draft tree a layer that
nobody who votes runs through is not computed at all, and its weights are not read.
"""

from dataclasses import replace

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from specjax.config.depth import DepthConfig
from specjax.decoding import target
from specjax.decoding import tree as trees
from specjax.decoding.tree import Tree
from specjax.depth import selection as selecting
from specjax.depth.predictor import Predictor
from specjax.depth.router import Router
from specjax.depth.selection import Selection
from specjax.errors import ConfigError
from specjax.models import cache as kv
from specjax.models import layers as nn
from specjax.models.llama import ForwardOutput, Llama


class Routed(nnx.Module):
    """The depth policy of a model with routers; `Llama.depth` holds it.

    Attributes:
        config: what the checkpoint says about the routers.
        routers: of layer `config.start_layer` and those after it.
        selection: what becomes of draft trees; anything but "off" is an approximation.
        predictor: scores nodes for the selection; None where that is off.
    """

    def __init__(
        self,
        config: DepthConfig,
        routers: list[Router],
        selection: Selection = selecting.OFF,
        predictor: Predictor | None = None,
    ):
        if (selection.mode == "off") != (predictor is None):
            raise ConfigError(
                f"tree_selection={selection.mode!r} "
                + ("has no use for a predictor" if predictor is not None else "needs a predictor")
            )
        self.config, self.selection = config, selection
        self.routers = nnx.List(routers)
        self.predictor = predictor

    def lossless(self, num_nodes: int) -> bool:
        """Whether decoding over trees of so many nodes gives what decoding token by token gives."""
        return self.selection.mode == "off" or num_nodes == 1

    def kept_nodes(self, count: int) -> int:
        """Nodes of a tree of `count` nodes that are verified."""
        return min(count, self.selection.survivors) if self.selection.mode == "prune" else count

    def run(
        self, model: Llama, block: nn.Block, cache: kv.KVCache, capture: tuple[int, ...] = ()
    ) -> ForwardOutput:
        """A pass in which no layer is skipped as a whole: chunks of prompts, texts to be scored."""
        going = _Pass(self, model, block, cache)
        x, captured = model.embed(block.tokens, block.positions), {}
        for index in range(len(model.model.layers)):
            if index in capture:
                captured[index] = x
            x = going.layer(index, x)
        captured[len(model.model.layers)] = x
        return going.output(x, tuple(captured[index] for index in capture))

    def run_tree(
        self,
        model: Llama,
        tree: Tree,
        cache: kv.KVCache,
        lengths: Int[Array, "B"],
        live: Bool[Array, "B"] | None,
        capture: tuple[int, ...] = (),
    ) -> tuple[ForwardOutput, Int[Array, "B M"] | None]:
        """A pass over a draft tree, which skips the layers that no voter runs through.

        Args:
            live: sequences that vote; None is all.
        Returns:
            the output, and the nodes that it has rows of; None if of all.
        """
        block = target.tree_block(tree, lengths)
        going = _Pass(self, model, block, cache)
        live = jnp.ones(lengths.shape, bool) if live is None else live
        voters, kept = going.padded(trees.used(tree) & live[:, None]), None
        x, captured = model.embed(block.tokens, block.positions), {}
        for index in range(len(model.model.layers)):
            if self.predictor is not None and index == self.predictor.layer:
                scores = self.predictor(x[:, : tree.num_nodes])
                if self.selection.mode == "vote":
                    on_path = selecting.predicted_path(tree, scores)
                    voters = going.padded(on_path & live[:, None])
                elif self.kept_nodes(tree.num_nodes) < tree.num_nodes:
                    count = self.kept_nodes(tree.num_nodes)
                    kept = selecting.survivors(tree, scores, count)
                    tree = trees.subset(tree, kept)
                    x = going.keep(index, kept, target.tree_block(tree, lengths), x)
                    captured = {at: going.padded(_rows(y, kept)) for at, y in captured.items()}
                    voters = going.padded(trees.used(tree) & live[:, None])
            if index in capture:
                captured[index] = x
            x = going.layer(index, x, voters)
        captured[len(model.model.layers)] = x
        going.count_runs(live)
        return going.output(x, tuple(captured[index] for index in capture)), kept


class _Pass:
    """One pass: what its layers have written so far."""

    def __init__(self, depth: Routed, model: Llama, block: nn.Block, cache: kv.KVCache):
        self.depth, self.model = depth, model
        self.keys, self.values = list(cache.keys), list(cache.values)
        self.valid, self.runs = list(cache.depth.valid), cache.depth.runs
        self.ran: list[Bool[Array, ""]] = []
        self._enter(block)

    def _enter(self, block: nn.Block) -> None:
        self.block = block
        self.tables = nn.position_tables(self.model.config, block)

    def padded(self, rows):
        """Rows of nodes [B, N, ...], as many as the block has."""
        spare = self.block.tokens.shape[1] - rows.shape[1]
        return jnp.pad(rows, [(0, 0), (0, spare)] + [(0, 0)] * (rows.ndim - 2))

    def layer(
        self, index: int, x: Float[Array, "B T D"], voters: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """The residual stream behind a layer, which runs if any of the voters runs through it (None: it runs)."""
        layer, start = self.model.model.layers[index], self.depth.config.start_layer
        written, rope = (self.keys[index], self.values[index]), nn.tables_of(layer, self.tables)
        if index < start:
            x, self.keys[index], self.values[index] = layer(x, self.block, rope, *written)
            self.ran.append(jnp.ones((), bool))
            return x
        executes = self.depth.routers[index - start].executes(x)
        executes |= self.block.positions < self.depth.config.reserved_tokens
        runs = jnp.ones((), bool) if voters is None else jnp.any(executes & voters)
        self.ran.append(runs)
        valid = kv.write_flags(self.valid[index - start], executes & runs, self.block.start)
        self.valid[index - start] = valid
        block = replace(self.block, valid=valid)

        def run(x, keys, values):
            y, keys, values = layer(x, block, rope, keys, values)
            return jnp.where(executes[..., None], y, x), keys, values

        if voters is None:
            x, *written = run(x, *written)
        else:
            x, *written = lax.cond(runs, run, lambda *same: same, x, *written)
        self.keys[index], self.values[index] = written
        return x

    def keep(
        self, index: int, kept: Int[Array, "B M"], block: nn.Block, x: Float[Array, "B T D"]
    ) -> Float[Array, "B R D"]:
        """Goes on from layer `index` with some of the rows, whose keys and values below it move together."""
        routed = max(index - self.depth.config.start_layer, 0)
        below = kv.KVCache(
            keys=tuple(self.keys[:index]),
            values=tuple(self.values[:index]),
            depth=kv.DepthRecord(valid=tuple(self.valid[:routed]), runs=self.runs),
        )
        below = kv.compact(below, self.block.start, kept, self.model.backend)
        self.keys[:index], self.values[:index] = below.keys, below.values
        self.valid[:routed] = below.depth.valid
        self._enter(block)
        return self.padded(_rows(x, kept))

    def count_runs(self, live: Bool[Array, "B"]) -> None:
        """Counts the layers that ran, for the sequences that take part."""
        self.runs = self.runs + (live[:, None] & jnp.stack(self.ran)).astype(jnp.int32)

    def output(self, x: Float[Array, "B T D"], captured) -> ForwardOutput:
        depth = kv.DepthRecord(valid=tuple(self.valid), runs=self.runs)
        cache = kv.KVCache(keys=tuple(self.keys), values=tuple(self.values), depth=depth)
        return ForwardOutput(hidden=self.model.model.norm(x), captured=captured, cache=cache)


def _rows(x: Float[Array, "B T D"], kept: Int[Array, "B M"]) -> Float[Array, "B M D"]:
    return jnp.take_along_axis(x, kept[..., None], axis=1)
