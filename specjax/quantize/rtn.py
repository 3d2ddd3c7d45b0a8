"""Round to nearest: each weight to the closest value of its group's grid."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from specjax.quant import scheme as schemes
from specjax.quant.linear import QuantizedLinear
from specjax.quant.scheme import Scheme, WeightSpec
from specjax.quantize import grid as grids
from specjax.quantize.grid import ClipSearch, Grid


def quantize(
    weight: Float[Array, "N K"],
    scheme: Scheme,
    group_size: int = -1,
    *,
    clip: ClipSearch | None = None,
    bias: Float[Array, "N"] | None = None,
    name: str = "linear",
) -> QuantizedLinear:
    """Quantizes a weight without calibration.

    Args:
        weight: dense, any float dtype; the arithmetic is float32.
        scheme: decides the grid; its activations only end up in the result.
        group_size: input features that share a scale; -1 is all of them.
        clip: search for each group's range, or None to cover it.
        bias: kept as it is.
        name: of the linear, for errors.

    Raises:
        ConfigError: `group_size` does not divide K.
    """
    size = schemes.check_group_size(weight.shape[1], group_size, name)
    grid, codes = _round(weight.astype(jnp.float32), scheme.weights, size, clip)
    return grids.to_linear(grid, codes, scheme, size, bias)


@functools.partial(jax.jit, static_argnames=("spec", "group_size", "clip"))
def _round(
    weight: Float[Array, "N K"], spec: WeightSpec, group_size: int, clip: ClipSearch | None
) -> tuple[Grid, Float[Array, "N K"]]:
    values = weight.reshape(weight.shape[0], -1, group_size)
    outer = grids.channel_scales(weight, spec, group_size)
    grid = grids.fit(values, spec, outer, clip)
    return grid, grid.encode(values).reshape(weight.shape)
