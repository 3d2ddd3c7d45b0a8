"""Tree attention: the public op. One node over the cache (decoding), a chain and a prompt chunk are the same op."""

from jaxtyping import Array, Bool, Float, Int

from specjax.pallas.tree_attention import reference


def tree_attention(
    q: Float[Array, "B T H C"],
    keys: Float[Array, "B K S C"],
    values: Float[Array, "B K S C"],
    *,
    start: Int[Array, "B"],
    prefix: Int[Array, "B"],
    tail: Bool[Array, "B T W"] | None,
) -> Float[Array, "B T H C"]:
    """See `reference.tree_attention`, which defines the op and is the only backend at present."""
    return reference.tree_attention(q, keys, values, start=start, prefix=prefix, tail=tail)
