"""Building blocks of decoders and of their draft heads; what a `ModelConfig` and a `LayerKind` say decides what runs.

Modules hold parameters and a pure forward; caches, masks and positions are arguments. A "linear" is anything with
`__call__(x)`, `out_features` and `in_features`: `Linear` and `QuantizedLinear` in quant/; models never mention bits.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from specjax.config import LayerKind, ModelConfig
from specjax.config.model import Activation
from specjax.models import cache as kv
from specjax.models.norms import Norm, RMSNorm
from specjax.models.rotary import apply_rope, rope_tables
from specjax.pallas import dispatch
from specjax.pallas.glue import api as glue
from specjax.pallas.glue import parts
from specjax.pallas.tree_attention import api as attention_op


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Block:
    """The tokens of one forward pass, where they go, and what they may see.

    Attributes:
        tokens: token ids.
        positions: rotary position of each token.
        start: cache slot of each sequence's first token; token t is written to slot start + t.
        prefix: slots below this are visible to all rows (not read where `tail` is None).
        tail: tail[b, t, w] says whether row t sees slot prefix + w; slots from prefix + W on are invisible.
            None means causal: row t sees slots 0 .. start + t.
        valid: slots that hold a key at all; None: all of them (else some tokens skip layers).
        length: tokens of the text that are known already, e.g. of the prompt; None: those up to each row. Only rotary
            embeddings that depend on it look (see `RopeConfig`).
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    start: Int[Array, "B"]
    prefix: Int[Array, "B"]
    tail: Bool[Array, "B T W"] | None
    valid: Bool[Array, "B S"] | None = None
    length: Int[Array, "B"] | None = None


def causal_block(
    tokens: Int[Array, "B T"], start: Int[Array, "B"], length: Int[Array, "B"] | None = None
) -> Block:
    """Consecutive tokens at slots and positions start, start + 1, ..."""
    positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=start.dtype)
    return Block(
        tokens=tokens, positions=positions, start=start, prefix=start, tail=None, length=length
    )


PLAIN = LayerKind()


class Embedding(nnx.Module):
    """Token embedding table [V, D]; also the output head of models with tied embeddings."""

    def __init__(self, weight: Float[Array, "V D"]):
        self.weight = nnx.Param(weight)

    def __call__(self, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        return jnp.take(self.weight[...], tokens, axis=0)


def position_tables(config: ModelConfig, block: Block):
    """Cosines and sines of each rotary embedding of the model at a block's positions; see `LayerKind.rotary`."""
    return tuple(
        rope_tables(rope, config.head_dim, block.positions, block.length) for rope in config.ropes
    )


def tables_of(layer: "DecoderLayer", tables):
    """Those of `position_tables` that a layer uses; None where it has no rotary embedding."""
    rotary = layer.self_attn.kind.rotary
    return None if rotary is None else tables[rotary]


class Attention(nnx.Module):
    """Grouped-query attention over a KV cache that it extends by the block's rows.

    Holds either `q_proj`, `k_proj`, `v_proj` (canonical) or the fused `qkv_proj` (after `prepare`); `q_norm` and
    `k_norm` where the model norms queries and keys.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        o_proj,
        q_proj=None,
        k_proj=None,
        v_proj=None,
        qkv_proj=None,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
        kind: LayerKind = PLAIN,
        backend: dispatch.Backend = "auto",
    ):
        self.config, self.backend, self.kind = config, backend, kind
        self.q_proj, self.k_proj, self.v_proj, self.qkv_proj = q_proj, k_proj, v_proj, qkv_proj
        self.q_norm, self.k_norm = q_norm, k_norm
        self.o_proj = o_proj

    def having(self, **changes) -> "Attention":
        """The same attention with other linears (or another backend); those that are not named stay."""
        names = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm", "backend")
        kept = {name: getattr(self, name) for name in names}
        return Attention(self.config, kind=self.kind, **(kept | changes))

    def project_qkv(self, x: Float[Array, "B T D"]):
        """Queries [B, T, H, C], keys and values [B, T, K, C], before the rotary embedding."""
        config, (batch, rows, _) = self.config, x.shape
        if self.qkv_proj is None:
            parts = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        else:
            width = config.num_heads * config.head_dim
            parts = jnp.split(
                self.qkv_proj(x), [width, width + config.num_kv_heads * config.head_dim], axis=-1
            )
        heads = tuple(part.reshape(batch, rows, -1, config.head_dim) for part in parts)
        if self.q_norm is None:
            return heads
        if config.qk_norm == "head":
            return self.q_norm(heads[0]), self.k_norm(heads[1]), heads[2]
        normed = self.q_norm(parts[0]), self.k_norm(parts[1])
        return *(part.reshape(batch, rows, -1, config.head_dim) for part in normed), heads[2]

    def rotate(self, q, k, rope):
        """Queries and keys turned by the rotary embedding; `rope` None is none."""
        if rope is None:
            return q, k
        interleaved = self.config.ropes[self.kind.rotary].interleaved
        return apply_rope(q, *rope, interleaved), apply_rope(k, *rope, interleaved)

    def score_settings(self, capacity: int) -> dict:
        """What `tree_attention` is told beside its masks; a window that a cache of `capacity` slots never reaches is
        none.
        """
        config, kind, settings = self.config, self.kind, {}
        if kind.window is not None and kind.window < capacity:
            settings["window"] = kind.window
        if config.query_scale is not None or kind.scale != 1:
            scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
            settings["scale"] = scale * kind.scale
        if config.score_softcap is not None:
            settings["softcap"] = config.score_softcap
        return settings

    def _fast_path(self, projected, block: Block, keys, settings) -> bool:
        """Whether projections go into the attention kernel as they are: for what Llama computes."""
        config = self.config
        plain = self.q_norm is None and not settings and self.kind.rotary == 0
        plain &= config.rope.rotary_fraction == 1 and not config.rope.interleaved
        fits = block.valid is None and plain
        fits = fits and glue.can_rotate_and_write(projected, keys, self.backend)
        return fits and attention_op.kernel_takes(projected, keys, block.tail, self.backend)

    def __call__(self, x: Float[Array, "B T D"], block: Block, rope, keys, values):
        """Returns (output [B, T, D], perhaps in parts; keys, values)."""
        settings = self.score_settings(keys.shape[2])
        if self.qkv_proj is not None:
            projected = parts.product(self.qkv_proj, x)
            if self._fast_path(projected, block, keys, settings):
                out, keys, values = attention_op.project_and_attend(
                    *(projected, rope, keys, values),
                    start=block.start,
                    prefix=block.prefix,
                    tail=block.tail,
                )
                return parts.product(self.o_proj, out.reshape(*x.shape[:2], -1)), keys, values
        q, k, v = self.project_qkv(x)
        q, k = self.rotate(q, k, rope)
        keys = kv.write_rows(keys, k.swapaxes(1, 2).astype(keys.dtype), block.start)
        values = kv.write_rows(values, v.swapaxes(1, 2).astype(values.dtype), block.start)
        out = attention_op.tree_attention(
            *(q, keys, values),
            start=block.start,
            prefix=block.prefix,
            tail=block.tail,
            valid=block.valid,
            backend=self.backend,
            **settings,
        )
        return parts.product(self.o_proj, out.reshape(*x.shape[:2], -1)), keys, values


_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class MLP(nnx.Module):
    """Gated feed-forward (SwiGLU, GeGLU): holds `gate_proj` and `up_proj`, or (after `prepare`) `gate_up_proj`.

    With `up_proj` alone there is no gate.
    """

    def __init__(
        self,
        *,
        down_proj,
        gate_proj=None,
        up_proj=None,
        gate_up_proj=None,
        activation: Activation = "silu",
    ):
        self.gate_proj, self.up_proj, self.gate_up_proj = gate_proj, up_proj, gate_up_proj
        self.down_proj, self.activation = down_proj, activation

    def having(self, **changes) -> "MLP":
        """The same feed-forward with other linears; those that are not named stay."""
        names = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
        kept = {name: getattr(self, name) for name in names}
        return MLP(activation=self.activation, **(kept | changes))

    def __call__(self, x: Float[Array, "B T D"]):
        """Output [B, T, D], perhaps in parts."""
        act = _ACTIVATIONS[self.activation]
        if self.gate_up_proj is None and self.gate_proj is None:
            inner = act(self.up_proj(x).astype(jnp.float32))
            return parts.product(self.down_proj, inner.astype(x.dtype))
        if self.gate_up_proj is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        gated = act(gate.astype(jnp.float32)) * up.astype(jnp.float32)
        return parts.product(self.down_proj, gated.astype(x.dtype))


class DecoderLayer(nnx.Module):
    """Attention and feed-forward with residuals, norms before or after them or both.

    Attributes:
        input_layernorm: before attention; None is no norm (EAGLE-1/2 heads, OLMo 2).
        post_attention_layernorm: before the feed-forward, as Llama calls it; None is no norm.
        attention_output_norm: of what attention adds to the residual stream; None is no norm.
        mlp_output_norm: of what the feed-forward adds.
    """

    def __init__(
        self,
        self_attn: Attention,
        mlp: MLP,
        input_layernorm: Norm | None,
        post_attention_layernorm: Norm | None,
        attention_output_norm: Norm | None = None,
        mlp_output_norm: Norm | None = None,
    ):
        self.self_attn, self.mlp = self_attn, mlp
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm
        self.attention_output_norm = attention_output_norm
        self.mlp_output_norm = mlp_output_norm

    def having(self, **changes) -> "DecoderLayer":
        """The same layer with other parts; those that are not named stay."""
        kept = {name: getattr(self, name) for name in ("self_attn", "mlp", *NORMS)}
        return DecoderLayer(**(kept | changes))

    def norms(self) -> dict[str, Norm]:
        """Its norms by attribute, without those that it has not."""
        found = {name: getattr(self, name) for name in NORMS}
        return {name: norm for name, norm in found.items() if norm is not None}

    def __call__(self, x: Float[Array, "B T D"], block: Block, rope, keys, values):
        """Returns (output [B, T, D], keys, values)."""
        x, added, keys, values = self.residual(x, None, block, rope, keys, values)
        return x + parts.value(added), keys, values

    def residual(self, x: Float[Array, "B T D"], added, block: Block, rope, keys, values):
        """The layer over x + added; returns (x, what is to be added to it, keys, values).

        What is added last stays apart so that the next norm can add it in the same launch; None is nothing.
        """
        x, normed = self._before(x, added, self.input_layernorm)
        attended, keys, values = self.self_attn(normed, block, rope, keys, values)
        attended = self._after(attended, self.attention_output_norm)
        x, normed = self._before(x, attended, self.post_attention_layernorm)
        return x, self._after(self.mlp(normed), self.mlp_output_norm), keys, values

    def _before(self, x, added, norm: Norm | None):
        """x + added, and what the next block reads."""
        if norm is None:
            x = x if added is None else x + parts.value(added)
            return x, x
        return glue.residual_norm(x, added, norm, self.self_attn.backend)

    def _after(self, added, norm: Norm | None):
        """What a block adds to the residual stream."""
        multiplier = self.self_attn.config.residual_multiplier
        if norm is not None:
            added = norm(parts.value(added))
        return added if multiplier == 1 else parts.value(added) * multiplier


NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "attention_output_norm",
    "mlp_output_norm",
)


# Jitted functions are traced and lowered once for all layers of a kind, and their kernels are compiled once; XLA
# inlines them. For the 32 layers of an 8B model, compiling ahead of time takes seconds in place of minutes.
shared_residual = jax.jit(DecoderLayer.residual)


@jax.jit
def shared(layer: nnx.Module, *arguments):
    """layer(*arguments)."""
    return layer(*arguments)
