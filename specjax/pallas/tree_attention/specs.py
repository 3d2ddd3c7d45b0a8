"""Shapes of real models, at which tree attention is compiled, tested and timed."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Attention of one layer.

    Attributes:
        name: model.
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: channels of a head.
    """

    name: str
    heads: int
    kv_heads: int
    head_dim: int

    def arguments(self, nodes: int, capacity: int, dtype=jnp.bfloat16, batch: int = 1) -> dict:
        """Abstract arguments of `mosaic.tree_attention` for a tree of `nodes`, or one token."""
        cache = jax.ShapeDtypeStruct((batch, self.kv_heads, capacity, self.head_dim), dtype)
        lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
        tail = jax.ShapeDtypeStruct((batch, nodes, nodes), jnp.bool_)
        return dict(
            q=jax.ShapeDtypeStruct((batch, nodes, self.heads, self.head_dim), dtype),
            keys=cache,
            values=cache,
            start=lengths,
            prefix=lengths,
            tail=tail if nodes > 1 else None,
        )


SPECS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec(name="llama3-8b", heads=32, kv_heads=8, head_dim=128),
        Spec(name="llama3-70b", heads=64, kv_heads=8, head_dim=128),
        Spec(name="smollm2-135m", heads=9, kv_heads=3, head_dim=64),
    )
}
