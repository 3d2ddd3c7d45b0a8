"""The router in front of a layer: does this token run through it (D-LLM, section 3.1)?"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from specjax.models import layers as nn
from specjax.quant.dense_linear import Linear

SKIP, EXECUTE = 0, 1  # columns of a router's logits
EPS = 1e-5


class Router(nnx.Module):
    """Linear - RMSNorm - SiLU - Linear; its parameters stay in float32.

    With `code_bits` it sees the codes of a min-max quantization of the token's hidden state instead of the state
    (SpaDec's robust router): tokens that are alike then get the same decision, and scale and offset drop out.
    """

    def __init__(self, up_proj: Linear, norm: nn.RMSNorm, down_proj: Linear, code_bits: int | None):
        self.up_proj, self.norm, self.down_proj = up_proj, norm, down_proj
        self.code_bits = code_bits

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... 2"]:
        """Logits of skipping and of executing."""
        x = x.astype(jnp.float32)
        if self.code_bits is not None:
            x = codes(x, self.code_bits)
        return self.down_proj(jax.nn.silu(self.norm(self.up_proj(x))))

    def executes(self, x: Float[Array, "... D"]) -> Bool[Array, "..."]:
        """The decision at inference; ties execute."""
        logits = self(x)
        return logits[..., EXECUTE] >= logits[..., SKIP]


def codes(x: Float[Array, "... D"], bits: int) -> Float[Array, "... D"]:
    """Codes 0 .. 2^bits - 1 of each token between its own least and largest value, as floats."""
    low, high = jnp.min(x, axis=-1, keepdims=True), jnp.max(x, axis=-1, keepdims=True)
    levels = 2**bits - 1
    step = (high - low) / levels + 1e-7
    return jnp.clip(jnp.round((x - low) / step), 0, levels)


def init(key: Array, hidden_size: int, width: int, code_bits: int | None) -> Router:
    """An untrained router; its bias leans towards executing."""
    first, second = jax.random.split(key)

    def matrix(key, out_features, in_features):
        bound = in_features**-0.5
        return jax.random.uniform(
            key, (out_features, in_features), jnp.float32, minval=-bound, maxval=bound
        )

    return Router(
        up_proj=Linear(matrix(first, width, hidden_size), jnp.zeros((width,), jnp.float32)),
        norm=nn.RMSNorm(jnp.ones((width,), jnp.float32), EPS),
        down_proj=Linear(matrix(second, 2, width), jnp.array([0.1, 2.0], jnp.float32)),
        code_bits=code_bits,
    )
