"""What the Predictor learns from: the nodes of real draft trees, and whether they were accepted."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specjax.decoding import sampling as sample
from specjax.decoding import target as passes
from specjax.decoding import tree as trees
from specjax.drafters.base import Chunk, Drafter
from specjax.engine import decode, engine
from specjax.engine.decode import DecodeState
from specjax.engine.program import Program
from specjax.models.llama import Llama
from specjax.verify.greedy import Greedy


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The nodes of a step's trees.

    Attributes:
        features: hidden state that enters the predictor's layer.
        accepted: every token from below the root to the node is the target's own greedy choice.
        drafted: used, not the root, and of a sequence that takes part in the step.
    """

    features: Float[Array, "B N D"]
    accepted: Bool[Array, "B N"]
    drafted: Bool[Array, "B N"]


def observed_step(
    target: Llama, drafter: Drafter, state: DecodeState, stop_ids: Int[Array, "E"], layer: int
) -> tuple[Nodes, DecodeState]:
    """A greedy step of decoding, and what its nodes looked like at `layer`.

    Trees are drafted and scored twice in this program, by `decode.step` and for the features: the compiler merges both.
    """
    sampling, live = sample.sampling(), ~state.done
    keys = sample.fold(sample.fold(state.keys, state.lengths + 1), 0)
    drafted = drafter.propose(
        target, state.cache, state.draft, state.root, state.lengths, keys, sampling
    )
    cache = replace(drafted.cache, depth=state.cache.depth)
    logits, features, _, tree = passes.forward_tree(
        target, drafted.tree, cache, state.lengths, (layer,), live=live
    )
    used = trees.used(tree).at[:, 0].set(False) & live[:, None]
    nodes = Nodes(features=features, accepted=accepted(tree, logits), drafted=used)
    return nodes, decode.step(target, drafter, state, stop_ids, sampling, Greedy())


def accepted(tree: trees.Tree, logits: Float[Array, "B N V"]) -> Bool[Array, "B N"]:
    """Which nodes greedy verification finds on a path of the target's own choices; the root always is."""
    best = sample.most_likely(logits)
    expected = jnp.take_along_axis(best, jnp.maximum(tree.parents, 0), axis=1)
    matches = ((tree.tokens == expected) & (tree.parents >= 0)).at[:, 0].set(True)
    return jnp.all(matches[:, None] | ~trees.ancestor_mask(tree), axis=-1) & trees.used(tree)


class Collector:
    """Decodes prompts greedily, in batches of one size, and keeps their nodes.

    Args:
        target: in run-time form, with tree selection "off".
        layer: the predictor's; its input is what is kept.
        shape: (batch size, cache slots, new tokens).
    """

    def __init__(
        self,
        target: Llama,
        drafter: Drafter,
        layer: int,
        stop_ids: Sequence[int],
        shape: tuple[int, int, int],
    ):
        self._target, self._drafter, self._layer, self._shape = target, drafter, layer, shape
        self._stop_ids = jnp.asarray(list(stop_ids) or [-1], jnp.int32)
        self._prefill = Program(decode.prefill_chunk)
        self._step = Program(observed_step, donate=("state",), static=("layer",))

    def nodes(
        self, prompts: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, Float[np.ndarray, "M D"], Bool[np.ndarray, "M"]]]:
        """(index of the prompt, features, accepted) of every step of up to a batch of prompts."""
        state = self._begin(prompts)
        while not np.all(state.done):
            found, state = self._step(
                target=self._target,
                drafter=self._drafter,
                state=state,
                stop_ids=self._stop_ids,
                layer=self._layer,
            )
            found = jax.tree.map(np.asarray, found)
            for row in range(len(prompts)):
                kept = found.drafted[row]
                if kept.any():
                    yield row, found.features[row][kept], found.accepted[row][kept]

    def _begin(self, prompts: Sequence[Sequence[int]]) -> DecodeState:
        """The state after the prompts; rows without one are done."""
        batch, capacity, new_tokens = self._shape
        state = decode.init_state(self._target, self._drafter, batch, capacity, new_tokens)
        state = replace(state, limit=jnp.full((batch,), new_tokens, jnp.int32))
        lengths = np.zeros(batch, np.int32)
        lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
        width = engine.MAX_CHUNK
        tokens = np.zeros((batch, -(-int(lengths.max()) // width) * width + 1), np.int32)
        for row, prompt in zip(tokens, prompts, strict=False):
            row[: len(prompt)] = prompt
        for begin in range(0, tokens.shape[1] - 1, width):
            state = self._prefill(
                target=self._target,
                drafter=self._drafter,
                state=state,
                chunk=Chunk(
                    tokens=jnp.asarray(tokens[:, begin : begin + width]),
                    next_tokens=jnp.asarray(tokens[:, begin + 1 : begin + width + 1]),
                    start=jnp.full((batch,), begin, jnp.int32),
                    valid=jnp.asarray(np.clip(lengths - begin, 0, width)),
                    features=None,
                ),
                prompt_len=jnp.asarray(lengths),
                stop_ids=self._stop_ids,
                sampling=sample.sampling(),
            )
        return state
