"""Few rows times a packed weight on Ampere and Ada: mma.sync behind a cp.async pipeline.

A block of four warps owns 64 outputs, one part of the inputs and up to 64 rows: out^T = W x^T, the
weight widened in registers as on Hopper, from the same packed form. Tables and group sums are read
from global memory, being too small for the copies of the pipeline.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from specjax.pallas.matmul import folding, registers
from specjax.pallas.matmul.form import TILE
from specjax.pallas.matmul.plan import Plan

_Layout = plgpu.Layout
_ROWS = 64
_HALVES = TILE // _ROWS
# A copy of the pipeline moves a multiple of this many swizzled tiles.
_TILES_PER_COPY = 4


def partial_sums(plan: Plan, inputs: dict[str, jax.Array], *, name: str, interpret=None):
    """The sums [splits, plan.rows, outputs] of each part of the inputs; as `wgmma` takes them."""
    names = tuple(inputs)
    outputs, config = plan.form.n_tiles * TILE, plan.config
    flat = dict(inputs)
    flat["codes"] = inputs["codes"].reshape(-1, TILE)
    for table in plan.tables:
        flat[table] = inputs[table].reshape(-1, TILE)
    out = plgpu.kernel(
        functools.partial(_body, plan, names),
        out_type=jax.ShapeDtypeStruct((config.splits, outputs, plan.rows), plan.out_dtype),
        grid=(_HALVES * plan.form.n_tiles, config.splits, plan.rows // plan.m_tile),
        grid_names=("n", "split", "m"),
        kernel_name=name,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*flat.values())
    return out.swapaxes(1, 2)


def _swizzled(num_bytes: int, bits: int):
    return plgpu.TilingTransform((8, num_bytes * 8 // bits)), plgpu.SwizzleTransform(num_bytes)


def _x_transforms(plan: Plan):
    """The widest swizzle of x within a unit's columns that leaves enough tiles for a copy."""
    bits = plan.operand.bits
    columns = plan.config.tiles_per_step * TILE
    for num_bytes in (128, 64, 32):
        width = num_bytes * 8 // bits
        tiles = plan.m_tile // 8 * (columns // width)
        if plan.unit % width == 0 and tiles % _TILES_PER_COPY == 0:
            return _swizzled(num_bytes, bits)
    raise NotImplementedError(f"no swizzle for {plan.m_tile} rows of {columns} inputs")


def _body(plan: Plan, names: tuple[str, ...], *refs):
    inputs, out_gmem = dict(zip(names, refs[:-1], strict=True)), refs[-1]
    n, split, m = (lax.axis_index(axis) for axis in ("n", "split", "m"))
    first, count = plan.steps(split)
    tiles = plan.config.tiles_per_step
    column = lax.div(n, _HALVES), lax.rem(n, _HALVES)

    def codes_block(tile: int, step):
        place = column[0] * plan.form.k_tiles + (first + step) * tiles + tile
        return place * _HALVES + column[1], 0

    blocks = [
        plgpu.BlockSpec(
            (_ROWS, TILE),
            functools.partial(codes_block, tile),
            transforms=_swizzled(TILE * plan.format.bits // 8, plan.format.bits),
            oob_fill_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
        )
        for tile in range(tiles)
    ]
    x_block = plgpu.BlockSpec(
        (plan.m_tile, tiles * TILE),
        lambda step: (m, first + step),
        transforms=_x_transforms(plan),
        oob_fill_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
    )

    def compute(indices, x_smem, *rest):
        *codes_smem, total = rest
        unit = (first + indices[0]) * plan.units_per_step
        total = _add_step(plan, inputs, total, x_smem, codes_smem, unit, column, m)
        if plan.operand.emulate:
            # The interpreter copies as TMA does, and asks for a fence between loads and writes.
            plgpu.commit_smem()
        return total

    total = plgpu.emit_pipeline(
        compute,
        grid=(count,),
        in_specs=(x_block, *blocks),
        max_concurrent_steps=plan.config.num_stages,
        init_carry=_zeros(plan, plan.sum_dtype),
    )(inputs["x"], *([inputs["codes"]] * tiles))
    where = split, _block(n, _ROWS), _block(m, plan.m_tile)
    out_gmem[where] = folding.finish(plan, total)


def _block(number, size: int):
    """The slice of a numbered block."""
    return pl.ds(number * size, size)


def _zeros(plan: Plan, dtype):
    shape = (_ROWS, plan.m_tile)
    return plgpu.layout_cast(jnp.zeros(shape, dtype), _Layout.MMA_ACC(plan.operand.dtype))


def _add_step(plan: Plan, inputs, total, x_smem, codes_smem, first_unit, column, m):
    """total + the products of one pipeline step."""
    for unit in range(plan.units_per_step):
        offset = unit * plan.unit
        table = functools.partial(_table, plan, inputs, first_unit + unit, column)
        codes = plgpu.load(
            codes_smem[offset // TILE], layout=registers.load_layout(plan.format.bits, plan.operand)
        )
        if plan.unit < TILE:
            codes = codes[:, offset % TILE : offset % TILE + plan.unit]
        scales = table("scales") if plan.format.scales_in_registers else None
        weight = registers.widen(codes, plan.format, plan.operand, scales)
        x = x_smem.at[:, _block(unit, plan.unit)]
        if not plan.group:
            total = _product(plan, total, weight, x)
            continue
        part = _product(plan, _zeros(plan, plan.acc_dtype), weight, x)
        sums = functools.partial(_sums, plan, inputs, first_unit + unit, m)
        total = folding.add_group(plan, total, part, table, sums)
    return total


def _product(plan: Plan, acc, weight, x):
    if plan.operand.emulate:
        contract = (((1,), (1,)), ((), ()))
        return acc + lax.dot_general(
            weight.astype(plan.acc_dtype), x[...].astype(plan.acc_dtype), contract
        )
    right = plgpu.load(x.T, layout=_Layout.MMA_RHS(plan.operand.dtype))
    return plgpu.mma(acc, weight, right)


def _table(plan: Plan, inputs, unit, column, key: str):
    """The entries of one unit for the block's outputs."""
    entries = inputs[key].shape[0] // plan.form.n_tiles
    ref = inputs[key].at[column[0] * entries + unit, _block(column[1], _ROWS)]
    return plgpu.load(ref, layout=registers.row_layout(plan.operand), optimized=False)


def _sums(plan: Plan, inputs, unit, m):
    ref = inputs["sums"].at[unit, _block(m, plan.m_tile)]
    layout = _Layout.MMA_ACC(plan.operand.dtype).reduce(0)
    return plgpu.load(ref, layout=layout, optimized=False)
