"""The values that a quantized weight can take, and how they are fitted to a weight.

A `Grid` holds what a scheme stores besides codes, one entry per output and group, and maps values
to codes and back with the formulas of `specjax.pallas.matmul.formats`. Every quantizer (round to nearest,
GPTQ, with or without smoothing or rotation) differs only in which value it rounds; the grid is
common to all of them and to all schemes.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from specjax.quant.linear import QuantizedLinear
from specjax.quant.scheme import Scheme, WeightSpec
from specjax.quantize import qoq

# The smallest positive half: a scale that underflowed to 0 would turn codes into NaN.
_SMALLEST_HALF = 2.0**-24


@dataclass(frozen=True, kw_only=True)
class ClipSearch:
    """Shrinks each group's range where that lowers the error of its weights.

    The defaults are those of QQQ and QuaRot: 80 ranges from 1 down to 0.21 times the largest
    magnitude, compared by sum |error|^2.4.

    Attributes:
        norm: exponent of the error.
        steps: ranges per unit of shrinkage.
        shrink: largest shrinkage, below 1.
    """

    norm: float = 2.4
    steps: int = 100
    shrink: float = 0.8


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Grid:
    """What a scheme stores besides codes. Entries are float32 with values that the stored dtype
    represents.

    Attributes:
        scales: of the first level (integers for QoQ with `channel_scales`).
        zeros: integers: subtracted from codes, or added to codes * scales (QoQ with
            `channel_scales`).
        minima: added to codes * scales.
        channel_scales: of the second level.
        spec: static.
    """

    scales: Float[Array, "N G"]
    zeros: Float[Array, "N G"] | None = None
    minima: Float[Array, "N G"] | None = None
    channel_scales: Float[Array, "N"] | None = None
    spec: WeightSpec = dataclasses.field(metadata=dict(static=True))

    @property
    def code_limits(self) -> tuple[float, float]:
        """Smallest and largest code in use: symmetric 8-bit and QQQ per-channel codes leave out the
        lowest one.
        """
        low, high = self.spec.code_range
        balanced = self.spec.bits == 8 or _balanced(self.spec, self.channel_scales)
        return (-high if self.spec.symmetric and balanced else low), high

    def column(self, group) -> "Grid":
        """The grid of one group, as a grid with G = 1 (`group` may be traced)."""

        def pick(a):
            return None if a is None else jax.lax.dynamic_slice_in_dim(a, group, 1, axis=1)

        arrays = {name: pick(getattr(self, name)) for name in ("scales", "zeros", "minima")}
        return dataclasses.replace(self, **arrays)

    def encode(self, values: Float[Array, "N G g"]) -> Float[Array, "N G g"]:
        """Codes of the nearest grid values, as floats."""
        step, low, high = self.scales, *self.code_limits
        if self.channel_scales is not None:
            step = step * self.channel_scales[:, None]
        if self.minima is not None:
            values = values - self.minima[..., None]
        elif self.zeros is not None and self.channel_scales is not None:
            values = values - (self.zeros * self.channel_scales[:, None])[..., None]
        codes = values / step[..., None]
        if self.spec.kind == "float":
            return jnp.clip(codes, low, high).astype(self.spec.code_dtype).astype(jnp.float32)
        codes = jnp.round(codes)
        if self.zeros is not None and self.channel_scales is None:
            codes = codes + self.zeros[..., None]
        return jnp.clip(codes, low, high)

    def decode(self, codes: Float[Array, "N G g"]) -> Float[Array, "N G g"]:
        """The values that codes stand for."""
        scales = self.scales[..., None]
        if self.channel_scales is None:
            if self.zeros is not None:
                return (codes - self.zeros[..., None]) * scales
            values = codes * scales
            return values if self.minima is None else values + self.minima[..., None]
        if self.zeros is not None:
            values = codes * scales + self.zeros[..., None]
        else:
            values = jnp.clip(jnp.round(codes * scales), -128, 127)
        return values * self.channel_scales[:, None, None]


def channel_scales(
    weight: Float[Array, "N K"], spec: WeightSpec, group_size: int
) -> Float[Array, "N"] | None:
    """Second-level scales of a two-level scheme, or None for one level."""
    if spec.levels == "single" or group_size == weight.shape[1]:
        return None
    bound = jnp.max(jnp.abs(weight), axis=1)
    if spec.levels == "qqq":
        # Codes reach -8 where the largest magnitude is at 7.5 steps; the int8 weight must hold
        # that.
        return jnp.where(bound == 0, 1.0, bound * (8 / 7.5) / 127)
    return _half(bound / qoq.PROTECTIVE_RANGE)


def fit(
    values: Float[Array, "N G g"],
    spec: WeightSpec,
    channel_scales: Float[Array, "N"] | None = None,
    clip: ClipSearch | None = None,
) -> Grid:
    """The grid that covers each group's range, or the best of the ranges that `clip` tries."""
    low, high = jnp.min(values, axis=-1), jnp.max(values, axis=-1)

    def fitted(shrink) -> Grid:
        return _cover(low * shrink, high * shrink, spec, channel_scales)

    if clip is None:
        return fitted(jnp.float32(1))

    def error(grid: Grid):
        off = jnp.abs(grid.decode(grid.encode(values)) - values)
        return jnp.sum(off**clip.norm, axis=-1)

    def keep_better(best, shrink):
        best_error, best_shrink = best
        new_error = error(fitted(shrink))
        better = new_error < best_error
        chosen = (jnp.where(better, new_error, best_error), jnp.where(better, shrink, best_shrink))
        return chosen, None

    shrinks = 1 - jnp.arange(1, int(clip.shrink * clip.steps), dtype=jnp.float32) / clip.steps
    start = (error(fitted(jnp.float32(1))), jnp.ones_like(low))
    (_, best), _ = jax.lax.scan(keep_better, start, shrinks)
    return fitted(best)


def to_linear(
    grid: Grid,
    codes: Float[Array, "N K"],
    scheme: Scheme,
    group_size: int,
    bias: Float[Array, "N"] | None = None,
) -> QuantizedLinear:
    """The canonical linear, with scales in half precision where every format that stores the scheme
    has them so.
    """
    progressive = grid.spec.levels == "qoq" and grid.channel_scales is not None
    scale_dtype = jnp.int8 if progressive else _scale_dtype(grid.spec)
    minor = jnp.float16 if grid.spec.levels == "qoq" else jnp.float32

    def cast(array, dtype):
        return None if array is None else array.astype(dtype)

    return QuantizedLinear(
        codes=codes.astype(scheme.weights.code_dtype),
        scales=grid.scales.astype(scale_dtype),
        zeros=cast(grid.zeros, jnp.int8),
        minima=cast(grid.minima, jnp.float16),
        channel_scales=cast(grid.channel_scales, minor),
        bias=bias,
        scheme=scheme,
        group_size=group_size,
    )


def _scale_dtype(spec: WeightSpec):
    """QQQ per channel and FP8 files hold float32 scales."""
    single = spec.kind == "float" and spec.bits == 8
    return jnp.float32 if single or spec.levels == "qqq" else jnp.float16


def _half(scales):
    """Rounded to half precision; 1 in place of 0 (a group of zeros)."""
    rounded = jnp.maximum(scales, _SMALLEST_HALF).astype(jnp.float16).astype(jnp.float32)
    return jnp.where(scales == 0, 1.0, rounded)


def _cover(low, high, spec: WeightSpec, channel_scales) -> Grid:
    """The grid over the ranges low..high [N, G]."""
    if spec.levels == "qoq" and channel_scales is not None:
        scales, zeros = qoq.second_level(low, high, channel_scales)
        return Grid(scales=scales, zeros=zeros, channel_scales=channel_scales, spec=spec)
    low, high = (low, high) if spec.symmetric else (jnp.minimum(low, 0), jnp.maximum(high, 0))
    if spec.levels == "qoq":
        scales = _half((high - low) / 15)
        # Centred, so that rounding the scale to half precision costs both ends the same.
        minima = ((high + low) / 2 - 7.5 * scales).astype(jnp.float16).astype(jnp.float32)
        minima = jnp.where(high == low, 0.0, minima)
        return Grid(scales=scales, minima=minima, spec=spec)
    if not spec.symmetric:
        scales = _half((high - low) / (2**spec.bits - 1))
        zeros = jnp.clip(jnp.round(-low / scales), 0, 2**spec.bits - 1)
        return Grid(scales=scales, zeros=zeros, spec=spec)
    bound = jnp.maximum(jnp.abs(low), jnp.abs(high))
    return _cover_symmetric(bound, spec, channel_scales)


def _cover_symmetric(bound, spec: WeightSpec, channel_scales) -> Grid:
    top = spec.code_range[1]
    if spec.kind == "int" and spec.bits == 4 and not _balanced(spec, channel_scales):
        top = 7.5  # GPTQ's choice: the largest magnitude rounds to 7 or -8
    steps = bound / top
    if channel_scales is not None:
        steps = _half(jnp.minimum(steps / channel_scales[:, None], 127 / 8))
        return Grid(scales=steps, channel_scales=channel_scales, spec=spec)
    if _scale_dtype(spec) == jnp.float32:
        return Grid(scales=jnp.where(steps == 0, 1.0, steps), spec=spec)
    return Grid(scales=_half(steps), spec=spec)


def _balanced(spec: WeightSpec, channel_scales) -> bool:
    return spec.levels == "qqq" and channel_scales is None
