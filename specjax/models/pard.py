"""PARD: a causal language model that drafts all tokens in one pass, behind rows of a token of their own.

A pass is fed the tokens that became known, the root last, and K - 1 times the PARD token; slot k is what the model says
behind the k-th row from the root on. It needs no features of the target. Slot p of the cache holds the token at
position p; what the last pass wrote behind the root is junk.
"""

import jax.numpy as jnp

from specjax.models import cache as kv
from specjax.models import layers as nn
from specjax.models.llama import Llama
from specjax.models.one_pass import OnePassHead


class PardHead(OnePassHead):
    """Attributes:
    model: the language model, over the target's vocabulary.
    mask_token: the PARD token.
    num_drafts: slots of a pass.
    """

    context_width = 0

    def __init__(self, model: Llama, mask_token: int, num_drafts: int):
        self.model, self.mask_token, self.num_drafts = model, mask_token, num_drafts

    @property
    def dtype(self):
        return self.model.dtype

    def init_cache(self, batch, capacity):
        return kv.init(self.model.config, batch, capacity, self.dtype)

    def take_in(self, rows, tokens, cache, target):
        return self.model(nn.causal_block(tokens, rows.start), cache).cache

    def draft(self, rows, root, cache, target):
        # Rows hold the tokens behind their positions: the first of them stands at start + 1.
        spare = self.num_drafts - 1
        known = jnp.arange(rows.tokens.shape[1] + spare) < rows.count[:, None]
        tokens = jnp.where(known, jnp.pad(rows.tokens, ((0, 0), (0, spare))), self.mask_token)
        out = self.model(nn.causal_block(tokens, rows.start + 1), cache)
        slots = (rows.count - 1)[:, None] + jnp.arange(self.num_drafts)
        return jnp.take_along_axis(out.hidden, slots[..., None], axis=1), out.cache

    def logits(self, hidden, target):
        return self.model.logits(hidden)
