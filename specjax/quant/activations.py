"""Dynamic rounding of activations: one symmetric scale per token, from its row's maximum.

    scale = amax * (1 / levels)        levels = 127 (int8), 7 (int4), 448 (e4m3), 6 (e2m1);
                                       127.5 and 7.5 with `full_range`
    codes = round_half_even(x * (levels / amax)), clipped to the code range

Everything is float32. The two factors are written as products on purpose: a compiler may turn a
division by a constant into a product, which would make codes at ties depend on how the expression
is compiled. Rows of zeros (or below 1e-30, where 1 / amax overflows) give codes 0 and scale 0. A
row with a NaN or an infinity gives a scale that is not finite and so an output row that is not
finite; other rows do not see it.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from specjax.quant.scheme import ActivationSpec

_SMALLEST_AMAX = 1e-30


class QuantizedActivations(NamedTuple):
    """Rows of quantized inputs.

    Attributes:
        codes: in the dtype of the specification.
        scale: x is about codes * scale.
        sums: sums over each group of the inputs before rounding, or None where not asked for.
    """

    codes: Shaped[Array, "... K"]
    scale: Float[Array, "... 1"]
    sums: Float[Array, "... G"] | None


def quantize(
    x: Float[Array, "... K"], spec: ActivationSpec, sum_groups: int | None = None
) -> QuantizedActivations:
    """Rounds each row of `x`; also sums `sum_groups` equal groups of unrounded features.

    With `spec.scale_dtype` "float16" scale and sums are rounded to half precision (QServe); codes
    are not affected.
    """
    values = x.astype(jnp.float32)
    amax = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    empty = amax < _SMALLEST_AMAX
    scale = jnp.where(empty, 0.0, amax * jnp.float32(1 / spec.levels))
    inverse = jnp.where(empty, 0.0, spec.levels / jnp.where(empty, 1.0, amax))
    codes = values * inverse
    if spec.kind == "int":
        codes = jnp.round(codes)
    codes = jnp.clip(codes, *spec.code_range).astype(spec.code_dtype)
    sums = None
    if sum_groups is not None:
        sums = _rounded(
            values.reshape(*x.shape[:-1], sum_groups, x.shape[-1] // sum_groups).sum(axis=-1), spec
        )
    return QuantizedActivations(codes=codes, scale=_rounded(scale, spec), sums=sums)


def _rounded(values: Float[Array, "..."], spec: ActivationSpec) -> Float[Array, "..."]:
    return values.astype(spec.scale_dtype).astype(jnp.float32)
