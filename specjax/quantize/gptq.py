"""GPTQ: rounds one input feature after the other and moves each rounding error to the features not
rounded yet.

Frantar et al., arXiv 2210.17323. The Hessian of a linear's squared output error is (2/n) sum x x^T
over calibration inputs. With act-order, features are visited by falling diagonal; groups stay those
of neighbouring features and their grids are fixed beforehand ("static groups"), so the stored order
is the natural one.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specjax import errors
from specjax.quant import scheme as schemes
from specjax.quant.linear import QuantizedLinear
from specjax.quant.scheme import Scheme, WeightSpec
from specjax.quantize import grid as grids
from specjax.quantize.grid import ClipSearch, Grid

_BLOCK = 128


@dataclass(frozen=True, kw_only=True, eq=False)
class Factor:
    """What calibration inputs say about rounding: shared by all linears that see the same inputs.

    Attributes:
        order: features in the order of visits.
        upper: upper triangular U with U^T U the inverse of the damped Hessian, in that order.
        dead: features that were never active.
        act_order: whether `order` is by falling diagonal (groups are then static).
    """

    order: Int[np.ndarray, "K"]
    upper: Float[np.ndarray, "K K"]
    dead: Bool[np.ndarray, "K"]
    act_order: bool


def factorize(
    hessian: Float[np.ndarray, "K K"],
    damping: float = 0.01,
    act_order: bool = False,
    name: str = "linear",
) -> Factor:
    """Factors a Hessian, (2/n) sum x x^T or any positive multiple of it, in float64.

    Args:
        hessian: symmetric, positive semidefinite.
        damping: share of the mean diagonal that is added to the diagonal.
        act_order: visit features by falling diagonal.
        name: of the linear, for errors.

    Raises:
        SpecjaxError: the Hessian is not finite, or not positive definite even with damping.
    """
    import scipy.linalg  # as slow to import as the rest of the package

    if not np.isfinite(hessian).all():
        raise errors.SpecjaxError(
            f"{name}: the Hessian of the calibration inputs is not finite; "
            "the activations overflow before this linear"
        )
    damped = np.array(hessian, np.float64)
    diagonal = np.einsum("ii->i", damped)
    dead = diagonal <= 0
    diagonal[dead] = 1
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(len(damped))
    diagonal += damping * diagonal.mean()
    # H = R R^T with R upper triangular (a Cholesky factor from the last feature on); U = R^-1.
    backwards = damped[np.ix_(order[::-1], order[::-1])]
    try:
        lower = scipy.linalg.cholesky(backwards, lower=True, overwrite_a=True, check_finite=False)
    except np.linalg.LinAlgError:
        raise errors.SpecjaxError(
            f"{name}: the Hessian is not positive definite with damping={damping}; "
            "use more calibration tokens or a larger damping"
        ) from None
    inverse, _ = scipy.linalg.lapack.dtrtri(lower, lower=True)
    upper = np.tril(inverse)[::-1, ::-1].astype(np.float32)
    return Factor(order=order, upper=upper, dead=dead, act_order=act_order)


def quantize(
    weight: Float[Array, "N K"],
    factor: Factor,
    scheme: Scheme,
    group_size: int = -1,
    *,
    clip: ClipSearch | None = None,
    bias: Float[Array, "N"] | None = None,
    name: str = "linear",
) -> QuantizedLinear:
    """Quantizes a weight so that outputs on the calibration inputs change least.

    Args:
        weight: dense, any float dtype; the arithmetic is float32.
        factor: of the Hessian of the inputs; weights of dead features become 0.
        scheme: decides the grid; its activations only end up in the result.
        group_size: input features that share a scale; -1 is all of them.
        clip: search for each group's range, or None to cover it.
        bias: kept as it is.
        name: of the linear, for errors.

    Raises:
        ConfigError: `group_size` does not divide K.
    """
    inputs = weight.shape[1]
    size = schemes.check_group_size(inputs, group_size, name)
    weight = jnp.where(jnp.asarray(factor.dead), 0.0, weight.astype(jnp.float32))
    static = factor.act_order or size == inputs or scheme.weights.levels == "qqq"
    block = _divisor(inputs, _BLOCK) if static else size
    grid, codes = _propagate(
        *(weight, jnp.asarray(factor.upper), jnp.asarray(factor.order, jnp.int32)),
        *(scheme.weights, size, block, static, clip),
    )
    return grids.to_linear(grid, codes, scheme, size, bias)


def _divisor(size: int, largest: int) -> int:
    return next(block for block in range(min(size, largest), 0, -1) if size % block == 0)


@functools.partial(jax.jit, static_argnames=("spec", "group_size", "block", "static", "clip"))
def _propagate(
    weight: Float[Array, "N K"],
    factor: Float[Array, "K K"],
    order: Int[Array, "K"],
    spec: WeightSpec,
    group_size: int,
    block: int,
    static: bool,
    clip: ClipSearch | None,
) -> tuple[Grid, Float[Array, "N K"]]:
    """Block after block of visited features; with groups that are not static, a block is a group.

    Blocks only update what comes later: `factor` is upper triangular, so its rows are zero before
    the block.
    """
    outputs, inputs = weight.shape
    outer = grids.channel_scales(weight, spec, group_size)
    grouped = weight.reshape(outputs, -1, group_size)
    fixed = grids.fit(grouped, spec, outer, clip) if static else None

    def one_block(rows, start):
        inside = jax.lax.dynamic_slice_in_dim(rows, start, block)
        factor_rows = jax.lax.dynamic_slice_in_dim(factor, start, block)
        square = jax.lax.dynamic_slice_in_dim(factor_rows, start, block, axis=1)
        groups = jax.lax.dynamic_slice_in_dim(order, start, block) // group_size
        grid = fixed if static else grids.fit(inside.T[:, None, :], spec, outer, clip)
        if not static:
            groups = jnp.zeros_like(groups)
        codes, scaled_errors = _round_block(inside, square, grid, groups)
        later = jnp.arange(inputs) >= start + block
        rows = rows - jnp.where(later, factor_rows, 0).T @ scaled_errors
        return rows, (codes, None if static else grid)

    rows = weight.T[order]
    _, (codes, blocks) = jax.lax.scan(one_block, rows, jnp.arange(0, inputs, block))
    codes = codes.reshape(inputs, outputs)[jnp.argsort(order)].T
    return (fixed if static else _joined(blocks, spec, outer)), codes


def _round_block(rows, square, grid: Grid, groups):
    """Rounds the features of one block [b, N] in turn; returns codes and errors divided by the
    factor's diagonal.
    """
    block = len(rows)

    def one_feature(i, state):
        rows, codes, scaled_errors = state
        column = grid.column(groups[i])
        value = rows[i][:, None, None]
        code = column.encode(value)
        error = (rows[i] - column.decode(code)[:, 0, 0]) / square[i, i]
        rows = rows - jnp.where(jnp.arange(block) > i, square[i], 0)[:, None] * error
        return rows, codes.at[i].set(code[:, 0, 0]), scaled_errors.at[i].set(error)

    start = (rows, jnp.zeros_like(rows), jnp.zeros_like(rows))
    _, codes, scaled_errors = jax.lax.fori_loop(0, block, one_feature, start)
    return codes, scaled_errors


def _joined(blocks: Grid, spec: WeightSpec, outer) -> Grid:
    """One grid [N, G] from the grids [G, N, 1] of all blocks."""

    def join(array):
        return None if array is None else array[..., 0].T

    return Grid(
        scales=join(blocks.scales),
        zeros=join(blocks.zeros),
        minima=join(blocks.minima),
        channel_scales=outer,
        spec=spec,
    )
