"""Matmuls of rows and packed weights: what surrounds the kernels.

Padding, group sums of the inputs, the choice of the skeleton by architecture, and the end of the
product, which XLA fuses with what follows: parts of split sums are added in their order, then
per-channel scales, zeros, minima and bias.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from specjax.pallas import device
from specjax.pallas.matmul import mma, packed, tiles, wgmma
from specjax.pallas.matmul.form import TILE, PackedWeight
from specjax.pallas.matmul.operand import Operand, dtype_bits
from specjax.pallas.matmul.plan import Config, Plan

_LARGEST_TILE = 64
# Rows that wgmma takes: multiples of 8; with int8 operands only some.
_INT8_TILES = (8, 16, 24, 32, 48, 64)


def m_tile(rows: int, operand_bits: int, arch: tuple[int, int]) -> int:
    """Rows per block: all of them up to 64, padded to what the matrix instruction takes."""
    if rows >= _LARGEST_TILE:
        return _LARGEST_TILE
    if operand_bits == 4:  # a pipeline copies no less
        return -(-rows // 16) * 16
    if operand_bits == 8 and arch[0] == 9:
        return next(tile for tile in _INT8_TILES if tile >= rows)
    return -(-rows // 8) * 8


def weights_per_thread(config: Config) -> int:
    """Weights that one thread multiplies in a pass of the main loop: 64 outputs to 128 threads."""
    return 64 * TILE * config.tiles_per_step // 128


def matmul(
    x: Shaped[Array, "M K"],
    weight: PackedWeight,
    *,
    arch: tuple[int, int],
    x_scale: Float[Array, "M 1"] | None = None,
    x_sums: Float[Array, "M G"] | None = None,
    bias: Float[Array, "N"] | None = None,
    out_dtype=None,
    config: Config | None = None,
    tuned: str | None = None,
    interpret=None,
) -> Float[Array, "M N"]:
    """See `api.matmul`; float inputs are float16 or bfloat16.

    Args:
        arch: compute capability of the GPU.
        config: tiles; default: tuned ones, or the heuristic.
        tuned: a table of tiles that goes before this package's, as JSON text.
        interpret: `plgpu.InterpretGPUParams` to run on CPUs.
    """
    launch = dict(arch=arch, config=config, tuned=tuned, interpret=interpret)
    if x_scale is None:
        return _float_matmul(x, weight, bias, **launch)
    out = _integer_matmul(x, x_scale, weight, x_sums, bias, **launch)
    return out.astype(jnp.float32 if out_dtype is None else out_dtype)


def _float_matmul(
    x: Float[Array, "M K"],
    weight: PackedWeight,
    bias: Float[Array, "N"] | None,
    *,
    arch: tuple[int, int],
    config: Config | None,
    tuned: str | None,
    interpret,
) -> Float[Array, "M N"]:
    """x W^T + bias in the dtype of x, sums in float32."""
    form = weight.form
    name = form.format.op(16)
    plan = _plan(x, weight, name, arch, config, tuned, interpret, inner_minima=True)
    direct = plan.config.splits == 1 and plan.group and bias is None
    if direct:
        plan = _with_dtype(plan, x.dtype)
    rows = _padded(x, plan)
    sums = None
    if form.per_channel or plan.uses_sums:
        sums = _group_sums(rows.astype(jnp.float32), plan)
    out = _partial_sums(plan, rows, weight, sums, name, interpret)
    if direct:
        return out[0, : len(x), : form.out_features]
    total = _added(out)
    if form.per_channel:
        total = _per_channel(total, weight, sums, jnp.float32)
        if weight.minima is not None:
            total = total + sums * _row(weight.minima, jnp.float32)
    total = total[: len(x), : form.out_features]
    return _with_bias(total, bias).astype(x.dtype)


def float_parts(
    x: Float[Array, "M K"],
    weight: PackedWeight,
    *,
    arch: tuple[int, int],
    config: Config | None = None,
    tuned: str | None = None,
    interpret=None,
) -> Float[Array, "P R N"] | None:
    """The parts of x W^T, padded, before they are added in order; None for weights whose scales come after the sum."""
    form = weight.form
    if form.per_channel or form.format.two_level:
        return None
    name = form.format.op(16)
    plan = _plan(x, weight, name, arch, config, tuned, interpret, inner_minima=True)
    rows = _padded(x, plan)
    sums = _group_sums(rows.astype(jnp.float32), plan) if plan.uses_sums else None
    return _partial_sums(plan, rows, weight, sums, name, interpret)


def _integer_matmul(
    x_codes: Shaped[Array, "M K"],
    x_scale: Float[Array, "M 1"],
    weight: PackedWeight,
    x_sums: Float[Array, "M G"] | None,
    bias: Float[Array, "N"] | None,
    *,
    arch: tuple[int, int],
    config: Config | None,
    tuned: str | None,
    interpret,
) -> Float[Array, "M N"]:
    """(x_codes * x_scale) W^T + bias, as `reference.quantized` defines it; accumulators are exact."""
    form = weight.form
    name = form.format.op(dtype_bits(x_codes.dtype))
    x = x_codes.astype(form.format.operand_dtype(x_codes.dtype, arch))
    plan = _plan(x, weight, name, arch, config, tuned, interpret, inner_minima=False)
    rows = _padded(x.astype(jnp.int8), plan)
    sums = None
    if plan.uses_sums or form.per_channel:
        sums = _group_sums(rows.astype(jnp.int32), plan)
    inner = sums
    if plan.uses_sums and (plan.sum_dtype == jnp.float32 or plan.shifts_late):
        inner = sums * plan.factor  # beside accumulators that are as much too large
    rows = rows.astype(plan.operand.dtype)
    total = _added(_partial_sums(plan, rows, weight, inner, name, interpret))
    if form.format.two_level:
        total = total.astype(jnp.float32) * weight.channel_scales.reshape(-1).astype(jnp.float32)
    elif form.per_channel:
        total = _per_channel(total >> (plan.factor.bit_length() - 1), weight, sums, jnp.int32)
    else:
        total = total * jnp.float32(1 / plan.factor)
    total = total[: len(x), : form.out_features] * x_scale.astype(jnp.float32)
    if weight.minima is not None:
        minima = packed.canonical_table(weight.minima, form).astype(jnp.float32)
        highest = jax.lax.Precision.HIGHEST
        total += jnp.einsum("mg,ng->mn", x_sums.astype(jnp.float32), minima, precision=highest)
    return _with_bias(total, bias)


def _plan(x, weight, name: str, arch, config, tuned, interpret, *, inner_minima) -> Plan:
    form = weight.form
    operand = Operand(
        dtype=jnp.dtype(x.dtype),
        unit="wgmma" if arch[0] == 9 else "mma",
        arch=arch,
        emulate=interpret is not None,
    )
    tile = m_tile(len(x), operand.bits, arch)
    if config is None:
        gpu = device.current() or tiles.typical(arch)
        config = tiles.lookup(name, form, tile, operand.bits, gpu, tuned)
    plan = Plan(
        form=form,
        operand=operand,
        config=config,
        rows=-(-len(x) // tile) * tile,
        m_tile=tile,
        has_zeros=weight.zeros is not None,
        has_minima=inner_minima and weight.minima is not None,
        out_dtype=jnp.dtype(jnp.float32),
    )
    return _with_dtype(plan, plan.sum_dtype)


def _with_dtype(plan: Plan, dtype) -> Plan:
    return dataclasses.replace(plan, out_dtype=jnp.dtype(dtype))


def _padded(x: Shaped[Array, "M K"], plan: Plan) -> Shaped[Array, "R J"]:
    """x padded to whole tiles; its columns follow those of weights packed for other operands."""
    form, bits = plan.form, plan.operand.bits
    columns = form.k_tiles * TILE
    x = jnp.pad(x, ((0, plan.rows - len(x)), (0, columns - x.shape[1])))
    if form.operand_bits == bits:
        return x
    stored = form.format.order(form.operand_bits).to_memory(x)
    return form.format.order(bits).from_memory(stored)


def _group_sums(rows: Shaped[Array, "R J"], plan: Plan) -> Shaped[Array, "R Q"]:
    """Sums of each group (or of all inputs), in an order that does not depend on the rows.

    XLA orders a reduction as suits its shape; sums of halves, written out, stay as they are.
    """
    parts = rows.reshape(plan.rows, -1, plan.group or rows.shape[1])
    while (width := parts.shape[-1]) % 2 == 0:
        parts = parts[..., : width // 2] + parts[..., width // 2 :]
    return functools.reduce(jnp.add, [parts[..., i] for i in range(parts.shape[-1])])


def _partial_sums(plan: Plan, rows, weight: PackedWeight, sums, name: str, interpret):
    inputs = dict(x=rows, codes=plan.format.loaded(weight.codes))
    inputs |= {table: getattr(weight, table) for table in plan.tables}
    if plan.uses_sums:
        inputs["sums"] = sums.T
    skeleton = wgmma if plan.operand.unit == "wgmma" else mma
    return skeleton.partial_sums(plan, inputs, name=name, interpret=interpret)


def _added(parts: Shaped[Array, "P R N"]) -> Shaped[Array, "R N"]:
    """The sum of the parts, one after the other: a reduction might choose its order by the shape."""
    return functools.reduce(jnp.add, [parts[i] for i in range(parts.shape[0])])


def _row(table: Shaped[Array, "I 1 128"], dtype) -> Shaped[Array, "N"]:
    return table.reshape(-1).astype(dtype)


def _per_channel(total, weight: PackedWeight, sums, dtype) -> Float[Array, "R N"]:
    """(total + zero * sums) * scale, one of each per output."""
    if weight.zeros is not None:
        total = total + sums * _row(weight.zeros, dtype)
    elif not weight.form.format.signed:
        total = total + sums * weight.form.format.half
    return total.astype(jnp.float32) * _row(weight.scales, jnp.float32)


def _with_bias(total: Float[Array, "M N"], bias: Float[Array, "N"] | None) -> Float[Array, "M N"]:
    return total if bias is None else total + bias.astype(jnp.float32)
