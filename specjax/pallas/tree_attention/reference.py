"""Attention of a block of tree or chain nodes over a KV cache: plain jnp; it defines the op and is the XLA backend."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def visible_slots(
    capacity: int,
    num_rows: int,
    start: Int[Array, "B"],
    prefix: Int[Array, "B"],
    tail: Bool[Array, "B T W"] | None,
    window: int | None = None,
) -> Bool[Array, "B T S"]:
    """Which of the `capacity` slots each row sees (see `specjax.models.layers.Block` for the rule).

    With a window each row sees the last `window` tokens of its own text only, itself included: tokens of the prefix
    stand at the slots of their positions, and those that the row sees in the tail are its path, in order.
    """
    slots = jnp.arange(capacity, dtype=start.dtype)
    if tail is None:
        last = start[:, None] + jnp.arange(num_rows, dtype=start.dtype)
        seen = slots[None, None] <= last[..., None]
        return seen if window is None else seen & (slots[None, None] > last[..., None] - window)
    offset = slots[None] - prefix[:, None]
    below = (offset < 0)[:, None]
    if window is not None:
        count = jnp.sum(tail, axis=-1, dtype=start.dtype)
        first = prefix[:, None] + count - window
        below = below & (slots[None, None] >= first[..., None])
        nearer = count[..., None] - jnp.cumsum(tail, axis=-1, dtype=start.dtype)
        tail = tail & (nearer < window)
    width = tail.shape[-1]
    index = jnp.broadcast_to(jnp.clip(offset, 0, width - 1)[:, None], (*tail.shape[:2], capacity))
    in_tail = jnp.take_along_axis(tail, index, axis=-1)
    in_tail &= ((offset >= 0) & (offset < width))[:, None]
    return below | in_tail


def tree_attention(
    q: Float[Array, "B T H C"],
    keys: Float[Array, "B K S C"],
    values: Float[Array, "B K S C"],
    *,
    start: Int[Array, "B"],
    prefix: Int[Array, "B"],
    tail: Bool[Array, "B T W"] | None,
    valid: Bool[Array, "B S"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T H C"]:
    """softmax(q k^T / sqrt(C)) v with float32 scores; each query head h reads kv head h // (H / K).

    Args:
        window: tokens that a row sees, itself included; see `visible_slots`.
        scale: of the scores, in place of 1 / sqrt(C).
        softcap: scaled scores s become softcap * tanh(s / softcap).

    Rows that see nothing get finite junk. Every row of a block sees at least its own slot, but for the slots that are
    not `valid`, which no row sees (None: all are).
    """
    batch, rows, heads, channels = q.shape
    kv_heads, capacity = keys.shape[1], keys.shape[2]
    visible = visible_slots(capacity, rows, start, prefix, tail, window)
    if valid is not None:
        visible &= valid[:, None]
    group = heads // kv_heads
    grouped = q.reshape(batch, rows, kv_heads, group, channels).transpose(0, 2, 1, 3, 4)
    grouped = grouped.reshape(batch, kv_heads, rows * group, channels)
    exact = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    scores = jnp.einsum("bkrc,bksc->bkrs", grouped, keys, **exact)
    mask = jnp.repeat(visible, group, axis=1)[:, None]
    scores = scores * (channels**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask, scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    out = jnp.einsum("bkrs,bksc->bkrc", weights, values, **exact)
    out = out.reshape(batch, kv_heads, rows, group, channels).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, rows, heads, channels).astype(q.dtype)
