"""Dynamic rounding of activations: one symmetric scale per token, from its row's maximum.

    scale = amax * (1 / levels)        levels = 127 (int8), 7 (int4), 448 (e4m3), 6 (e2m1)
    codes = round_half_even(x * (levels / amax)), clipped to the code range

With `full_range` the order of operations is that of compressed-tensors, since rows whose largest
magnitude is negative lie on an exact tie at -127.5 that every other order breaks differently:

    scale = amax / levels              levels = 127.5 (int8), 7.5 (int4); rounded to the dtype of x
    codes = round_half_even(clip(x / scale)), the quotient rounded to the dtype of x first

Everything else is float32. A compiler may turn a division by a constant into a product, which would
make codes at ties depend on how the expression is compiled: the first form writes products, the
second divides by what no compiler takes for a constant. Rows of zeros (or below 1e-30, where
1 / amax overflows) give codes 0 and scale 0. A row with a NaN or an infinity gives a scale that is
not finite and so an output row that is not finite; other rows do not see it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

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
    if spec.full_range:
        scale, codes = _divided(values, amax, empty, spec.levels, x.dtype)
    else:
        scale = jnp.where(empty, 0.0, amax * jnp.float32(1 / spec.levels))
        codes = values * jnp.where(empty, 0.0, spec.levels / jnp.where(empty, 1.0, amax))
    if spec.kind == "int":
        codes = jnp.round(codes)
    codes = jnp.clip(codes, *spec.code_range).astype(spec.code_dtype)
    sums = None
    if sum_groups is not None:
        sums = _rounded(
            values.reshape(*x.shape[:-1], sum_groups, x.shape[-1] // sum_groups).sum(axis=-1), spec
        )
    return QuantizedActivations(codes=codes, scale=_rounded(scale, spec), sums=sums)


def _divided(
    values: Float[Array, "... K"],
    amax: Float[Array, "... 1"],
    empty: Bool[Array, "... 1"],
    levels: float,
    dtype: jnp.dtype,
) -> tuple[Float[Array, "... 1"], Float[Array, "... K"]]:
    """Scale and unrounded codes by division, each rounded to `dtype` as a tensor library does."""
    # XLA divides by a constant, and by a row's broadcast scalar, through a rounded reciprocal. These divisors are
    # neither to it: the product is zero (or NaN in rows that are not finite anyway), and no scale is chosen for NaN.
    scale = _as_computed_in(amax / (levels + 0.0 * amax), dtype)
    empty = empty | (scale == 0)
    divisor = jnp.where(empty | jnp.isnan(values), 1.0, scale)
    codes = _as_computed_in(values / divisor, dtype)
    return jnp.where(empty, 0.0, scale), jnp.where(empty, 0.0, codes)


def _as_computed_in(values: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """float32 values rounded to what `dtype` holds; not by converting twice, which compilers may leave out."""
    info = jnp.finfo(dtype)
    rounded = jax.lax.reduce_precision(values, info.nexp, info.nmant)
    if info.nexp >= jnp.finfo(jnp.float32).nexp:
        return rounded
    # reduce_precision has no subnormal numbers.
    step = float(info.smallest_subnormal)
    small = jnp.round(values * (1 / step)) * step
    return jnp.where(jnp.abs(values) < float(info.smallest_normal), small, rounded)


def _rounded(values: Float[Array, "..."], spec: ActivationSpec) -> Float[Array, "..."]:
    return values.astype(spec.scale_dtype).astype(jnp.float32)
