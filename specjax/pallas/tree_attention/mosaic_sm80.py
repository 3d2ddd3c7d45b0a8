"""Tree attention for sm_80 to sm_89: cp.async through `emit_pipeline`, and mma.sync. `frame.py` has what both share."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from specjax.pallas.tree_attention import frame
from specjax.pallas.tree_attention.config import ROWS


def kernel(layout: frame.Layout, q, keys, values, mask, bounds):
    """One warpgroup per thread block; sums by split, see `frame.out_types`."""
    config = layout.config
    batch, kv_heads, capacity, channels = keys.shape
    blocks = capacity // config.block
    halves = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def body(q_ref, k_ref, v_ref, mask_ref, bounds_ref, out_ref, top_ref, total_ref):
        head, tile, split = (lax.axis_index(name) for name in ("head", "tile", "split"))
        sequence, kv_head = lax.div(head, kv_heads), lax.rem(head, kv_heads)
        prefix, start = bounds_ref[sequence, 0], bounds_ref[sequence, 1]
        count, _ = frame.block_range(layout, (prefix, start), split, tile, capacity)
        rows = pl.ds(tile * ROWS, ROWS)
        dtype = q_ref.dtype
        accumulator = plgpu.Layout.MMA_ACC(dtype)
        by_row = accumulator.reduce(1)
        queries = plgpu.load(
            q_ref.at[sequence, kv_head, rows],
            layout=plgpu.Layout.MMA_LHS(dtype),
            optimized=False,
        )
        words = [
            plgpu.load(mask_ref.at[sequence, word, rows], layout=by_row, optimized=False)
            for word in range(layout.num_words)
        ]

        def constant(shape, value, layout):
            return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

        def one_block(indices, k_smem, v_smem, carry):
            out, top, total = carry
            (step,) = indices
            shape = (ROWS, config.block)
            loaded = plgpu.load(k_smem.T, layout=plgpu.Layout.MMA_RHS(dtype))
            scores = _mma(layout, constant(shape, 0.0, accumulator), queries, loaded)
            column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=accumulator) + (
                (split + step * config.splits) * config.block
            )
            spread = [lax.broadcast_in_dim(word, shape, (0,)) for word in words]
            seen = frame.visible(layout, column, spread, prefix)
            scaled = scores * frame.score_scale(channels)
            scaled = jnp.where(seen, scaled, jnp.float32(frame.NEVER))
            weights, decay, top, total = frame.online_softmax(scaled, top, total)
            out = out * lax.broadcast_in_dim(decay, out.shape, (0,))
            loaded = plgpu.load(v_smem, layout=plgpu.Layout.MMA_RHS(dtype))
            return _mma(layout, out, _as_left(layout, weights, dtype), loaded), top, total

        def where(step):
            return head * blocks + split + step * config.splits, 0

        spec = plgpu.BlockSpec((config.block, channels), where, transforms=halves)
        carry = (
            constant((ROWS, channels), 0.0, accumulator),
            constant((ROWS,), frame.NEVER, by_row),
            constant((ROWS,), 0.0, by_row),
        )
        out, top, total = plgpu.emit_pipeline(
            one_block,
            grid=(count,),
            in_specs=(spec, spec),
            max_concurrent_steps=config.stages,
            init_carry=carry,
        )(k_ref, v_ref)
        out_ref[split, sequence, kv_head, rows] = out
        top_ref[split, sequence, kv_head, rows] = top
        total_ref[split, sequence, kv_head, rows] = total

    run = plgpu.kernel(
        body,
        out_type=frame.out_types(layout, q, ROWS),
        **frame.grid(layout, q),
        kernel_name="tree_attention_sm80",
        interpret=layout.interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
    rows_of = (batch * kv_heads * capacity, channels)
    return run(q, keys.reshape(rows_of), values.reshape(rows_of), mask, bounds)


def _mma(layout: frame.Layout, accumulator, left, right):
    """accumulator + left right."""
    if layout.interpret is None:
        return plgpu.mma(accumulator, left, right)
    # The interpreter has no mma.sync.
    return accumulator + jnp.dot(left.astype(jnp.float32), right.astype(jnp.float32))


def _as_left(layout: frame.Layout, weights, dtype):
    """An accumulator as the left operand of the next product: the same registers under other names."""
    weights = weights.astype(dtype)
    if layout.interpret is not None:
        return weights
    wanted = plgpu.Layout.MMA_LHS(dtype)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.MMA_ACC(dtype),),
        return_type=plgpu.ShapeDtypeStruct(weights.shape, dtype, wanted),
    )
    def rename(ctx, held):
        tiled = wanted.to_mgpu()
        shape, registers = tiled.registers_shape(held.shape), held.registers
        renamed = np.empty(shape, dtype=object)
        (pair,) = (i for i, size in enumerate(registers.shape) if i >= 2 and size == 2)
        column, row = (i for i, size in enumerate(shape) if i >= 2 and size == 2)
        for index in np.ndindex(shape):
            source = [0] * registers.ndim
            source[0] = index[0]
            source[1] = index[1] * 2 + index[column]
            source[pair] = index[row]
            renamed[index] = registers[tuple(source)]
        return mgpu.FragmentedArray(_registers=renamed, _layout=tiled, _is_signed=None)

    return rename(weights)
