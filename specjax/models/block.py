"""Heads that draft a block in one pass over the target's features: DFlash, DSpark and JetSpec.

The rows of a block are [root, MASK, MASK, ...]. They attend to each other, both ways or causally, and to projected
features of the target at all positions before: one row of context per position, normed, the same for all layers, which
the layers do not change. The cache holds keys and values of the context; those of the last block behind it are junk.
"""

from dataclasses import dataclass, replace

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from specjax.config import ModelConfig
from specjax.models import cache as kv
from specjax.models import layers as nn
from specjax.models.llama import Llama
from specjax.models.markov import Confidence, Markov
from specjax.models.one_pass import OnePassHead
from specjax.quant.dense_linear import Linear


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What blocks are; static.

    Attributes:
        size: rows of a block, the root's included.
        mask_token: token of all rows but the root's.
        fill_in: a slot predicts the token at its own position, so that the root's row drafts nothing; else the token
            at the next position, and all rows draft.
        causal: of each layer, whether a row of the block sees the rows before it only, or all of them.
        windows: of each layer, how many positions before the root it sees at most; None: all.
        embedding_multiplier: of the target's embeddings, where they are used.
    """

    size: int
    mask_token: int
    fill_in: bool
    causal: tuple[bool, ...]
    windows: tuple[int | None, ...]
    embedding_multiplier: float = 1.0


class BlockHead(OnePassHead):
    """Attributes:
    config: of its layers, which see whatever their masks let through.
    layout: see `Layout`.
    fc, hidden_norm: from the target's features side by side to a row of context.
    input_norm: of these features, before `fc`; None is none.
    layers, norm: decoder layers, and the norm behind them.
    lm_head, embed_tokens: own ones, or None: the target's.
    d2t: target id minus draft id of each draft token [U]; None: the full vocabulary.
    markov: term of the logits that depends on the token before; None is none.
    confidence: how sure a draft is; None: not known.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: Layout,
        needs: tuple[int, ...],
        fc: Linear,
        hidden_norm: nn.RMSNorm,
        layers: list[nn.DecoderLayer],
        norm: nn.RMSNorm,
        *,
        lm_head: Linear | None = None,
        embed_tokens: nn.Embedding | None = None,
        d2t: Int[Array, "U"] | None = None,
        input_norm: nn.RMSNorm | None = None,
        markov: Markov | None = None,
        confidence: Confidence | None = None,
    ):
        self.config, self.layout, self.needs = config, layout, needs
        self.fc, self.hidden_norm, self.input_norm = fc, hidden_norm, input_norm
        self.layers, self.norm = nnx.List(layers), norm
        self.lm_head, self.embed_tokens = lm_head, embed_tokens
        self.d2t = None if d2t is None else nnx.Variable(d2t)
        self.markov, self.certainty = markov, confidence

    @property
    def num_drafts(self) -> int:
        return self.layout.size - 1 if self.layout.fill_in else self.layout.size

    @property
    def stepwise(self) -> bool:
        return self.markov is not None

    @property
    def dtype(self):
        return self.norm.weight.dtype

    @property
    def context_width(self) -> int:
        return self.config.hidden_size

    def init_cache(self, batch, capacity):
        return kv.init(self.config, batch, capacity, self.dtype)

    def fuse(self, features: Float[Array, "... A"]) -> Float[Array, "... D"]:
        """A row of context."""
        if self.input_norm is not None:
            features = self.input_norm(features)
        return self.hidden_norm(self.fc(features))

    def take_in(self, rows, tokens, cache, target):
        return self._remember(rows, cache)

    def _remember(self, rows, cache: kv.KVCache) -> kv.KVCache:
        """The cache with rows of context at their positions."""
        tables = nn.position_tables(self.config, nn.causal_block(rows.tokens, rows.start))
        keys, values = [], []
        for layer, *kept in zip(self.layers, cache.keys, cache.values, strict=True):
            attention = layer.self_attn
            _, new, value = attention.project_qkv(rows.features)
            _, new = attention.rotate(new, new, nn.tables_of(layer, tables))
            for buffer, written, all_rows in zip((keys, values), (new, value), kept, strict=True):
                written = written.swapaxes(1, 2).astype(all_rows.dtype)
                buffer.append(kv.write_rows(all_rows, written, rows.start))
        return kv.KVCache(keys=tuple(keys), values=tuple(values))

    def draft(self, rows, root, cache, target):
        layout, cache = self.layout, self._remember(rows, cache)
        start = rows.start + rows.count
        row = jnp.arange(layout.size)
        tokens = jnp.where(row == 0, root[:, None], layout.mask_token)
        positions = start[:, None] + row
        tail = jnp.broadcast_to(row[:, None] >= row, (len(root), layout.size, layout.size))
        causal = nn.Block(tokens=tokens, positions=positions, start=start, prefix=start, tail=tail)
        x, keys, values = self._embed(tokens, target), [], []
        tables = nn.position_tables(self.config, causal)
        slots = jnp.arange(cache.capacity)
        settings = zip(self.layers, layout.causal, layout.windows, strict=True)
        for index, (layer, is_causal, window) in enumerate(settings):
            block = causal if is_causal else replace(causal, tail=jnp.ones_like(tail))
            if window is not None:
                block = replace(block, valid=slots >= (start - window)[:, None])
            kept = cache.keys[index], cache.values[index]
            x, *written = nn.shared(layer, x, block, nn.tables_of(layer, tables), *kept)
            keys.append(written[0])
            values.append(written[1])
        x = self.norm(x)
        if layout.fill_in:
            # What the root's row came to is read by the carried state of an "rnn" term only.
            first = jnp.broadcast_to(x[:, :1], x[:, 1:].shape)
            x = jnp.concatenate([x[:, 1:], first], axis=-1) if self._carries else x[:, 1:]
        return x, kv.KVCache(keys=tuple(keys), values=tuple(values))

    @property
    def _carries(self) -> bool:
        return self.layout.fill_in and self.markov is not None and self.markov.kind == "rnn"

    def _embed(self, tokens: Int[Array, "B T"], target: Llama) -> Float[Array, "B T D"]:
        if self.embed_tokens is not None:
            return self.embed_tokens(tokens).astype(self.dtype)
        x = target.model.embed_tokens(tokens).astype(self.dtype)
        multiplier = self.layout.embedding_multiplier
        return x if multiplier == 1 else x * jnp.asarray(multiplier, x.dtype)

    def _state(self, hidden: Float[Array, "... E"]) -> Float[Array, "... D"]:
        return hidden[..., : self.config.hidden_size]

    def logits(self, hidden, target):
        """Without the term that depends on the token before."""
        hidden = self._state(hidden)
        if self.lm_head is None:
            return target.logits(hidden)
        return self.lm_head(hidden).astype(jnp.float32)

    def begin(self, hidden, root):
        carry = self.markov.begin(self._state(hidden[:, 0]))
        if self._carries:
            carry, _ = self.markov(carry, hidden[:, 0, self.config.hidden_size :], root)
        return carry

    def step(self, carry, hidden, logits, previous):
        carry, term = self.markov(carry, self._state(hidden), previous)
        return carry, logits + term

    @property
    def knows_confidence(self) -> bool:
        return self.certainty is not None

    def confidence(self, hidden, previous):
        return self.certainty(self._state(hidden), previous)

    def target_ids(self, draft_ids):
        return draft_ids if self.d2t is None else draft_ids + self.d2t[...][draft_ids]
