"""Building blocks of the Llama family and of its draft heads.

Modules hold parameters and a pure forward; caches, masks and positions are arguments. A "linear" is anything with
`__call__(x)`, `out_features` and `in_features`: `Linear` and `QuantizedLinear` in quant/; models never mention bits.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from specjax.config import ModelConfig, RopeConfig
from specjax.models import cache as kv
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
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    start: Int[Array, "B"]
    prefix: Int[Array, "B"]
    tail: Bool[Array, "B T W"] | None
    valid: Bool[Array, "B S"] | None = None


def causal_block(tokens: Int[Array, "B T"], start: Int[Array, "B"]) -> Block:
    """Consecutive tokens at slots and positions start, start + 1, ..."""
    positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=start.dtype)
    return Block(tokens=tokens, positions=positions, start=start, prefix=start, tail=None)


class Embedding(nnx.Module):
    """Token embedding table [V, D]; also the output head of models with tied embeddings."""

    def __init__(self, weight: Float[Array, "V D"]):
        self.weight = nnx.Param(weight)

    def __call__(self, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        return jnp.take(self.weight[...], tokens, axis=0)


class RMSNorm(nnx.Module):
    """Root-mean-square norm with float32 statistics.

    With `centered` the mean is removed first: what QServe's kernels compute in place of RMSNorm; only for checking
    against them.
    """

    def __init__(self, weight: Float[Array, "D"], eps: float, centered: bool = False):
        self.weight = nnx.Param(weight)
        self.eps = eps
        self.centered = centered

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        if self.centered:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.weight[...].astype(jnp.float32)).astype(x.dtype)


def rope_tables(
    rope: RopeConfig, head_dim: int, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T 1 C"], Float[Array, "B T 1 C"]]:
    """Cosines and sines in float32 (bfloat16 would round positions above 256)."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(rope.inv_freq(head_dim))
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: Float[Array, "B T H C"], cos, sin) -> Float[Array, "B T H C"]:
    """Rotates the pairs (i, i + C/2), the convention of Hugging Face Llama checkpoints."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    return (x.astype(jnp.float32) * cos + rotated * sin).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention over a KV cache that it extends by the block's rows.

    Holds either `q_proj`, `k_proj`, `v_proj` (canonical) or the fused `qkv_proj` (after `prepare`).
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
        backend: dispatch.Backend = "auto",
    ):
        self.config, self.backend = config, backend
        self.q_proj, self.k_proj, self.v_proj, self.qkv_proj = q_proj, k_proj, v_proj, qkv_proj
        self.o_proj = o_proj

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
        return tuple(part.reshape(batch, rows, -1, config.head_dim) for part in parts)

    def __call__(self, x: Float[Array, "B T D"], block: Block, rope, keys, values):
        """Returns (output [B, T, D], perhaps in parts; keys, values)."""
        if self.qkv_proj is not None:
            projected = parts.product(self.qkv_proj, x)
            fits = block.valid is None and glue.can_rotate_and_write(projected, keys, self.backend)
            if fits and attention_op.kernel_takes(projected, keys, block.tail):
                out, keys, values = attention_op.project_and_attend(
                    *(projected, rope, keys, values),
                    start=block.start,
                    prefix=block.prefix,
                    tail=block.tail,
                )
                return parts.product(self.o_proj, out.reshape(*x.shape[:2], -1)), keys, values
        q, k, v = self.project_qkv(x)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        keys = kv.write_rows(keys, k.swapaxes(1, 2).astype(keys.dtype), block.start)
        values = kv.write_rows(values, v.swapaxes(1, 2).astype(values.dtype), block.start)
        out = attention_op.tree_attention(
            *(q, keys, values),
            start=block.start,
            prefix=block.prefix,
            tail=block.tail,
            valid=block.valid,
            backend=self.backend,
        )
        return parts.product(self.o_proj, out.reshape(*x.shape[:2], -1)), keys, values


class MLP(nnx.Module):
    """SwiGLU feed-forward; holds `gate_proj` and `up_proj`, or the fused `gate_up_proj` (after `prepare`)."""

    def __init__(self, *, down_proj, gate_proj=None, up_proj=None, gate_up_proj=None):
        self.gate_proj, self.up_proj, self.gate_up_proj = gate_proj, up_proj, gate_up_proj
        self.down_proj = down_proj

    def __call__(self, x: Float[Array, "B T D"]):
        """Output [B, T, D], perhaps in parts."""
        if self.gate_up_proj is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        gated = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
        return parts.product(self.down_proj, gated.astype(x.dtype))


class DecoderLayer(nnx.Module):
    """Pre-norm attention and feed-forward with residuals. `input_layernorm` None means no norm (EAGLE-1/2 heads)."""

    def __init__(
        self,
        self_attn: Attention,
        mlp: MLP,
        input_layernorm: RMSNorm | None,
        post_attention_layernorm: RMSNorm,
    ):
        self.self_attn, self.mlp = self_attn, mlp
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm

    def __call__(self, x: Float[Array, "B T D"], block: Block, rope, keys, values):
        """Returns (output [B, T, D], keys, values)."""
        x, added, keys, values = self.residual(x, None, block, rope, keys, values)
        return x + parts.value(added), keys, values

    def residual(self, x: Float[Array, "B T D"], added, block: Block, rope, keys, values):
        """The layer over x + added; returns (x, what is to be added to it, keys, values).

        What is added last stays apart so that the next norm can add it in the same launch; None is nothing.
        """
        backend = self.self_attn.backend
        if self.input_layernorm is None:
            x = normed = x if added is None else x + parts.value(added)
        else:
            x, normed = glue.residual_norm(x, added, self.input_layernorm, backend)
        attended, keys, values = self.self_attn(normed, block, rope, keys, values)
        x, normed = glue.residual_norm(x, attended, self.post_attention_layernorm, backend)
        return x, self.mlp(normed), keys, values


# Jitted functions are traced and lowered once for all layers of a kind, and their kernels are compiled once; XLA
# inlines them. For the 32 layers of an 8B model, compiling ahead of time takes seconds in place of minutes.
shared_residual = jax.jit(DecoderLayer.residual)


@jax.jit
def shared(layer: nnx.Module, *arguments):
    """layer(*arguments)."""
    return layer(*arguments)
