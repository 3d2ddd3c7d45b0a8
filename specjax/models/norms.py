"""Norms with float32 statistics."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """Root-mean-square norm with float32 statistics, times gain = weight + offset.

    With `centered` the mean is removed first: what QServe's kernels compute in place of RMSNorm; only for checking
    against them.
    """

    def __init__(
        self, weight: Float[Array, "D"], eps: float, centered: bool = False, offset: float = 0.0
    ):
        self.weight = nnx.Param(weight)
        self.eps = eps
        self.centered = centered
        self.offset = offset

    @property
    def gain(self) -> Float[Array, "D"]:
        """What normed rows are multiplied by; float32."""
        gain = self.weight[...].astype(jnp.float32)
        return gain + self.offset if self.offset else gain

    @property
    def is_plain(self) -> bool:
        """Whether it is RMSNorm as kernels know it."""
        return not (self.centered or self.offset)

    def with_gain(self, gain: Float[Array, "D"]) -> "RMSNorm":
        """The same norm with another gain."""
        return RMSNorm(gain - self.offset, self.eps, self.centered, self.offset)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        if self.centered:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.gain).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Norm over mean and variance in float32, with gain and bias."""

    is_plain = False

    def __init__(self, weight: Float[Array, "D"], bias: Float[Array, "D"], eps: float):
        self.weight, self.bias = nnx.Param(weight), nnx.Param(bias)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        y = y * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


Norm = RMSNorm | LayerNorm
