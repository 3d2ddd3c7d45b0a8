"""Products whose split sums have not been added yet, so that whoever needs them adds them on the way."""

import functools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Parts:
    """x W^T in parts.

    Attributes:
        sums: float32; adding them in order gives the product, with padding behind its rows and columns.
        shape: of the product, e.g. (B, T, N); static.
        dtype: that it is rounded to, once; static.
    """

    sums: Float[Array, "P R N"]
    shape: tuple[int, ...] = field(metadata={"static": True})
    dtype: jnp.dtype = field(metadata={"static": True})

    @property
    def num_rows(self) -> int:
        """Rows of the product."""
        count = 1
        for size in self.shape[:-1]:
            count *= size
        return count

    def value(self) -> Float[Array, "..."]:
        """The product."""
        total = functools.reduce(jnp.add, [self.sums[i] for i in range(self.sums.shape[0])])
        total = total[: self.num_rows, : self.shape[-1]].astype(self.dtype)
        return total.reshape(self.shape)


def value(product: "Parts | Array") -> Float[Array, "..."]:
    """A product, whether it is in parts or not."""
    return product.value() if isinstance(product, Parts) else product


def product(linear, x: Float[Array, "... K"]) -> "Parts | Array":
    """linear(x), in parts where the linear offers them."""
    parts = linear.parts(x) if hasattr(linear, "parts") else None
    return linear(x) if parts is None else parts
