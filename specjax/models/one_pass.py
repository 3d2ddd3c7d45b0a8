"""Draft heads that draft several tokens in one pass: the interface, and the rows that a pass takes in.

A kind states what its pass computes (`draft`), what its cache holds (`init_cache`, `take_in`) and which features of the
target it is fed (`needs`, `fuse`); rounds, trees, rollback, batches and sampling are the drafter's, the same for all
kinds (`specjax.drafters.one_pass`).
"""

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from specjax.models import cache as kv
from specjax.models.llama import Llama


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Rows:
    """What became known since the last pass: consecutive positions start, start + 1, ... of which `count` are known.

    Attributes:
        features: the target's features of each position, as the head's `fuse` makes them; width 0 where it needs none.
        tokens: the token after each position; at the last known one that is the root.
        start: first position; also the slot of the head's cache up to which it holds true rows.
        count: known rows, at least 1 while a text is decoded: start + count is the root's position. Junk behind.
    """

    features: Float[Array, "B R D"]
    tokens: Int[Array, "B R"]
    start: Int[Array, "B"]
    count: Int[Array, "B"]


class OnePassHead(nnx.Module):
    """Base of heads that draft in one pass.

    Attributes:
        needs: what it wants of the target's passes, see `specjax.drafters.base.Needs`.
        num_drafts: slots K that a pass drafts: slot k proposes the token k + 1 places behind the root.
        stepwise: the logits of a slot depend on the token drafted before it: `step` says how.
    """

    needs: Any = None
    num_drafts: int
    stepwise = False

    @property
    def dtype(self):
        """Compute dtype."""
        raise NotImplementedError

    @property
    def context_width(self) -> int:
        """Width of fused features; 0 where none are needed."""
        raise NotImplementedError

    def init_cache(self, batch: int, capacity: int) -> kv.KVCache:
        """An empty cache."""
        raise NotImplementedError

    def fuse(self, features: Float[Array, "... A"]) -> Float[Array, "... D"]:
        """The target's features as rows hold them."""
        return features

    def take_in(
        self, rows: Rows, tokens: Int[Array, "B R"], cache: kv.KVCache, target: Llama
    ) -> kv.KVCache:
        """Writes a piece of the prompts to slots start, start + 1, ...; all rows, known or not.

        Args:
            tokens: the token at each position (`rows.tokens` are those after them).
        """
        raise NotImplementedError

    def draft(
        self, rows: Rows, root: Int[Array, "B"], cache: kv.KVCache, target: Llama
    ) -> tuple[Float[Array, "B K D"], kv.KVCache]:
        """The pass: takes in the known rows and drafts behind `root`, at position start + count.

        Returns:
            what `logits` reads of each slot, and the cache, in which slots from start + count on are junk; at most
            R + K + 1 slots from `start` on may be written.
        """
        raise NotImplementedError

    def logits(self, hidden: Float[Array, "... D"], target: Llama) -> Float[Array, "... U"]:
        """Logits over the draft vocabulary of each slot by itself; float32."""
        raise NotImplementedError

    def begin(self, hidden: Float[Array, "B K D"], root: Int[Array, "B"]) -> Any:
        """Where `stepwise`: what `step` carries from slot to slot, a pytree of arrays [B, ...]."""
        return ()

    def step(self, carry, hidden: Float[Array, "B D"], logits, previous: Int[Array, "B"]):
        """Where `stepwise`: (carry, logits [B, U]) of a slot, given the token id (of the target) before it."""
        return carry, logits

    @property
    def knows_confidence(self) -> bool:
        """Whether `confidence` has an answer."""
        return False

    def confidence(
        self, hidden: Float[Array, "B D"], previous: Int[Array, "B"]
    ) -> Float[Array, "B"]:
        """Logit of the probability that the draft of a slot is kept, given the token before it and that that is."""
        raise NotImplementedError

    def target_ids(self, draft_ids: Int[Array, "..."]) -> Int[Array, "..."]:
        """Token ids of the target's vocabulary."""
        return draft_ids
