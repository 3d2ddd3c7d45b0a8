"""QoQ's progressive quantization: uint4 codes over an int8 weight over a floating-point scale per
output.

QServe (arXiv 2405.04532, section 4.1). Level 1 keeps int8 weights within +-119, so that level 2,
whose steps are at most 16, never leaves [-128, 127]: w8 = code * scale + zero, with an integer
scale and zero per group.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

PROTECTIVE_RANGE = 119


def second_level(
    low: Float[Array, "N G"], high: Float[Array, "N G"], channel_scales: Float[Array, "N"]
) -> tuple[Float[Array, "N G"], Float[Array, "N G"]]:
    """Integer (scales, zeros), as floats, that cover the ranges low..high of each group.

    code * scale + zero fits int8 for every code 0..15, not only for those in use.
    """
    unit = channel_scales[:, None]
    low = jnp.clip(jnp.round(low / unit), -PROTECTIVE_RANGE, PROTECTIVE_RANGE)
    high = jnp.clip(jnp.round(high / unit), -PROTECTIVE_RANGE, PROTECTIVE_RANGE)
    scales = jnp.maximum(jnp.ceil((high - low) / 15), 1)
    zeros = jnp.round((high + low) / 2 - 7.5 * scales)
    return scales, jnp.clip(zeros, -128, 127 - 15 * scales)
