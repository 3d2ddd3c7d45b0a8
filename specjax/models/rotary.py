"""Rotary embeddings: cosines and sines at positions, and the rotation of heads by them."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specjax.config import RopeConfig


def rope_tables(
    rope: RopeConfig,
    head_dim: int,
    positions: Int[Array, "B T"],
    length: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B T 1 C"], Float[Array, "B T 1 C"]]:
    """Cosines and sines in float32 (bfloat16 would round positions above 256) of the channels that turn.

    Args:
        length: see `Block.length`.
    """
    if rope.depends_on_length:
        known = positions + 1 if length is None else jnp.maximum(positions + 1, length[:, None])
        frequencies = _frequencies_at(rope, head_dim, known)
    else:
        frequencies = jnp.asarray(rope.inv_freq(head_dim))
    angles = positions[..., None].astype(jnp.float32) * frequencies
    angles = jnp.repeat(angles, 2, -1) if rope.interleaved else jnp.concatenate([angles] * 2, -1)
    angles = angles[:, :, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if rope.attention_factor != 1:
        cos, sin = cos * rope.attention_factor, sin * rope.attention_factor
    return cos, sin


def _frequencies_at(
    rope: RopeConfig, head_dim: int, length: Int[Array, "B T"]
) -> Float[Array, "B T F"]:
    """Angles per position in a text of `length` tokens."""
    original = rope.original_max_position_embeddings
    if rope.kind == "longrope":
        short, long = (jnp.asarray(rope.inv_freq(head_dim, long)) for long in (False, True))
        return jnp.where((length > original)[..., None], long, short)
    # NTK scaling: the base grows with the length, so that the slowest frequency turns as far as before.
    plain = jnp.asarray(rope.inv_freq(head_dim))
    dim = int(head_dim * rope.rotary_fraction)
    ratio = jnp.maximum(length, original).astype(jnp.float32) / original
    stretch = rope.factor * ratio - (rope.factor - 1)
    exponents = jnp.arange(len(plain), dtype=jnp.float32) * (2 / max(dim - 2, 1))
    return plain * stretch[..., None] ** -exponents


def apply_rope(x: Float[Array, "B T H C"], cos, sin, interleaved: bool = False):
    """Rotates the pairs (i, i + R/2) of the first R channels, those that the tables have; the others stay.

    R = C is the convention of Hugging Face Llama checkpoints. With `interleaved` the pairs are (2i, 2i + 1).
    """
    width, whole = cos.shape[-1], x
    if width < x.shape[-1]:
        x = x[..., :width]
    turned = x.astype(jnp.float32)
    if interleaved:
        pairs = turned.reshape(*turned.shape[:-1], -1, 2)
        rotated = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(turned.shape)
    else:
        first, second = jnp.split(turned, 2, axis=-1)
        rotated = jnp.concatenate([-second, first], axis=-1)
    turned = (turned * cos + rotated * sin).astype(x.dtype)
    if width == whole.shape[-1]:
        return turned
    return jnp.concatenate([turned, whole[..., width:]], axis=-1)
