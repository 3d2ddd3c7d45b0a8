"""What each request of a batch asks for, one row per slot: traced values, so that no request compiles anything."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specjax.decoding import adjust, tree
from specjax.decoding.sampling import Sampling

UNLIMITED = np.iinfo(np.int32).max


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Rows:
    """One row per slot.

    Attributes:
        temperature, top_k, top_p, min_p: see `Sampling`; temperature 0 is greedy.
        stop_ids: token ids that end the request; -1 matches nothing.
        max_draft_depth: drafted nodes deeper than this are ignored; 0 is plain decoding.
        wants_logprobs: whether any look at the request's log-probabilities is to come.
        adjustments: bias and penalties, and what they count.
    """

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    stop_ids: Int[Array, "B E"]
    max_draft_depth: Int[Array, "B"]
    wants_logprobs: Bool[Array, "B"]
    adjustments: adjust.Adjustments

    def sampling(self, greedy: bool) -> Sampling:
        """How tokens are chosen; `greedy` promises that every row that runs is."""
        values = (self.temperature, self.top_k, self.top_p, self.min_p)
        names = ("temperature", "top_k", "top_p", "min_p")
        return Sampling(**dict(zip(names, values, strict=True)), greedy=greedy, filtered=not greedy)


def cut(rows: Rows, proposed: tree.Tree) -> tree.Tree:
    """The proposed trees without the nodes that a row ignores, which become unused ones."""
    depth = tree.depths(tree.ancestor_mask(proposed))
    inside = depth <= rows.max_draft_depth[:, None]
    parents = jnp.where(inside, proposed.parents, -1)
    return replace(proposed, parents=parents)


def idle(batch: int, vocab: int, num_stop_ids: int, num_biased: int) -> Rows:
    """Rows of slots without a request."""

    def full(value, dtype, *shape):
        return jnp.full((batch, *shape), value, dtype)

    return Rows(
        temperature=full(0, jnp.float32),
        top_k=full(UNLIMITED, jnp.int32),
        top_p=full(1, jnp.float32),
        min_p=full(0, jnp.float32),
        stop_ids=full(-1, jnp.int32, num_stop_ids),
        max_draft_depth=full(UNLIMITED, jnp.int32),
        wants_logprobs=full(False, bool),
        adjustments=adjust.Adjustments(
            bias_ids=full(vocab, jnp.int32, num_biased),
            bias=full(0, jnp.float32, num_biased),
            presence=full(0, jnp.float32),
            frequency=full(0, jnp.float32),
            repetition=full(1, jnp.float32),
            counts=full(0, jnp.int32, vocab),
            in_prompt=full(False, bool, vocab),
        ),
    )


def row(
    vocab: int,
    num_stop_ids: int,
    num_biased: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop_ids: Sequence[int] = (),
    max_draft_depth: int | None = None,
    wants_logprobs: bool = False,
    presence: float = 0.0,
    frequency: float = 0.0,
    repetition: float = 1.0,
    bias: Mapping[int, float] | None = None,
) -> dict[str, np.ndarray]:
    """One request's row as NumPy arrays of the shapes that `take_in` expects; values are those of a checked request.

    See `placed` for how it becomes a `Rows`.
    """
    bias = dict(bias or {})
    tiny, huge = np.finfo(np.float32).tiny, 1 / np.finfo(np.float32).tiny
    return {
        "temperature": np.float32([min(max(temperature, tiny), huge) if temperature > 0 else 0]),
        "top_k": np.int32([min(top_k or UNLIMITED, UNLIMITED)]),
        "top_p": np.float32([max(top_p, tiny)]),
        "min_p": np.float32([min_p]),
        "stop_ids": _filled(list(stop_ids), num_stop_ids, -1, np.int32),
        "max_draft_depth": np.int32([UNLIMITED if max_draft_depth is None else max_draft_depth]),
        "wants_logprobs": np.asarray([wants_logprobs]),
        "bias_ids": _filled(list(bias), num_biased, vocab, np.int32),
        "bias": _filled(list(bias.values()), num_biased, 0, np.float32),
        "presence": np.float32([presence]),
        "frequency": np.float32([frequency]),
        "repetition": np.float32([repetition]),
    }


def placed(like: Rows, values: Mapping[str, Array]) -> Rows:
    """A `row` as the `Rows` of one slot, nothing generated yet."""
    own = {name: value for name, value in values.items() if hasattr(like, name)}
    rest = {name: value for name, value in values.items() if name not in own}
    rest |= {
        "counts": jnp.zeros_like(like.adjustments.counts),
        "in_prompt": jnp.zeros_like(like.adjustments.in_prompt),
    }
    return Rows(**own, adjustments=adjust.Adjustments(**rest))


def _filled(values: list, width: int, filler, dtype) -> np.ndarray:
    return np.asarray([values + [filler] * (width - len(values))], dtype)
