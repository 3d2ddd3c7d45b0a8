"""P-EAGLE (speculators, vLLM's parallel drafting): EAGLE-3's network drafts all tokens in one pass.

Behind the known rows stand rows of a mask token, each with the learned feature `mask_hidden` in place of the target's;
slot k is read from the k-th row behind the last known one, whose own output is slot 0. The cache holds the pairs of
EAGLE-3; the mask rows in it are junk.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from specjax.models import cache as kv
from specjax.models import layers as nn
from specjax.models.eagle3 import Eagle3Head
from specjax.models.one_pass import OnePassHead


class PEagleHead(OnePassHead):
    """Attributes:
    body: the network.
    mask_hidden: what mask rows are fed where real ones have the target's features [A].
    mask_token: token of mask rows.
    num_drafts: slots of a pass.
    """

    def __init__(
        self, body: Eagle3Head, mask_hidden: Float[Array, "A"], mask_token: int, num_drafts: int
    ):
        self.body, self.mask_hidden = body, nnx.Param(mask_hidden)
        self.mask_token, self.num_drafts = mask_token, num_drafts
        self.needs = body.needs

    @property
    def dtype(self):
        return self.body.dtype

    @property
    def context_width(self):
        return self.body.config.hidden_size

    def init_cache(self, batch, capacity):
        return kv.init(
            self.body.config, batch, capacity, self.dtype, num_layers=self.body.num_layers
        )

    def fuse(self, features):
        return self.body.fuse(features)

    def take_in(self, rows, tokens, cache, target):
        block = nn.causal_block(rows.tokens, rows.start)
        return self.body(rows.features, block, cache, target)[1]

    def draft(self, rows, root, cache, target):
        # Mask rows follow the last known one without a gap, so that the pass is causal and windows count positions.
        spare = ((0, 0), (0, self.num_drafts - 1))
        known = jnp.arange(rows.tokens.shape[1] + spare[1][1]) < rows.count[:, None]
        tokens = jnp.where(known, jnp.pad(rows.tokens, spare), self.mask_token)
        mask = self.fuse(self.mask_hidden[...])
        features = jnp.pad(rows.features, (*spare, (0, 0)))
        features = jnp.where(known[..., None], features, mask)
        block = nn.causal_block(tokens, rows.start)
        out, cache = self.body(features, block, cache, target)
        slots = (rows.count - 1)[:, None] + jnp.arange(self.num_drafts)
        return jnp.take_along_axis(out, slots[..., None], axis=1), cache

    def logits(self, hidden, target):
        return self.body.logits(hidden, target)

    def target_ids(self, draft_ids):
        return self.body.target_ids(draft_ids)
