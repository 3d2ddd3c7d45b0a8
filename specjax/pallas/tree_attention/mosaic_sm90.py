"""Tree attention for Hopper: TMA copies and wgmma. `frame.py` has what both share."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from specjax.pallas.tree_attention import frame
from specjax.pallas.tree_attention.config import ROWS


def kernel(layout: frame.Layout, q, keys, values, mask, bounds):
    """One warpgroup copies with TMA, the others multiply with wgmma; each of those has 64 rows."""
    config = layout.config
    channels, kv_heads = q.shape[-1], q.shape[1]
    groups, stages, block = config.warpgroups, config.stages, config.block
    kept = layout.kept_rows
    halves = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    floats = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
    scratch = dict(
        q_smem=plgpu.SMEM((groups, ROWS, channels), q.dtype, transforms=halves),
        k_smem=plgpu.SMEM((stages, block, channels), q.dtype, transforms=halves),
        v_smem=plgpu.SMEM((stages, block, channels), q.dtype, transforms=halves),
        out_smem=plgpu.SMEM((groups, ROWS, channels), jnp.float32, transforms=floats),
        q_full=plgpu.Barrier(num_barriers=groups),
        k_full=plgpu.Barrier(num_barriers=stages),
        v_full=plgpu.Barrier(num_barriers=stages),
        k_free=plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        v_free=plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
    )

    def body(q_ref, k_ref, v_ref, mask_ref, bounds_ref, out_ref, top_ref, total_ref, **smem):
        head, tile, split = (lax.axis_index(name) for name in ("head", "tile", "split"))
        warpgroup = lax.axis_index("warpgroup")
        sequence, kv_head = lax.div(head, kv_heads), lax.rem(head, kv_heads)
        prefix, start = bounds_ref[sequence, 0], bounds_ref[sequence, 1]
        count, num_full = frame.block_range(layout, (prefix, start), split, tile, keys.shape[2])

        @pl.when(warpgroup == groups)
        def _copy():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, count)
            def _(step):
                stage = lax.rem(step, jnp.int32(stages))
                slots = pl.ds((split + step * config.splits) * block, block)
                for name, source in (("k", k_ref), ("v", v_ref)):

                    @pl.when(step >= stages)
                    def _(name=name):
                        plgpu.barrier_wait(smem[f"{name}_free"].at[stage])

                    plgpu.copy_gmem_to_smem(
                        source.at[sequence, kv_head, slots],
                        smem[f"{name}_smem"].at[stage],
                        smem[f"{name}_full"].at[stage],
                    )

        @pl.when(warpgroup < groups)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            first_row = tile * layout.tile + warpgroup * ROWS
            rows = pl.ds(first_row, ROWS)
            queries = smem["q_smem"].at[warpgroup]
            plgpu.copy_gmem_to_smem(
                q_ref.at[sequence, kv_head, rows], queries, smem["q_full"].at[warpgroup]
            )
            plgpu.barrier_wait(smem["q_full"].at[warpgroup])
            mask_rows = [mask_ref.at[sequence, word, rows] for word in range(layout.num_words)]
            out, top, total = _attend(
                layout, queries, mask_rows, smem, (prefix, split), count, num_full
            )
            top_ref[split, sequence, kv_head, rows] = top
            total_ref[split, sequence, kv_head, rows] = total
            out_smem = smem["out_smem"].at[warpgroup]
            out_smem[...] = out
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                out_smem.at[pl.ds(0, kept)],
                out_ref.at[split, sequence, kv_head, pl.ds(first_row, kept)],
            )
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    run = plgpu.kernel(
        body,
        out_type=frame.out_types(layout, q, kept),
        scratch_types=scratch,
        **frame.grid(layout, q),
        num_threads=groups + 1,
        thread_name="warpgroup",
        kernel_name="tree_attention",
        interpret=layout.interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return run(q, keys, values, mask, bounds)


def _attend(layout: frame.Layout, queries, mask_rows, smem, place, count, num_full):
    """The compute warpgroup's loop; returns the unnormalized sums, maxima and sums of weights of its rows."""
    config, (prefix, split) = layout.config, place
    channels, dtype = queries.shape[-1], queries.dtype
    by_row = plgpu.Layout.WGMMA.reduce(1)
    scale = frame.score_scale(channels)
    words = [plgpu.load(ref, layout=by_row, optimized=False) for ref in mask_rows]

    def constant(shape, value, layout):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    def one_block(step, carry, masked):
        out, top, total = carry
        stage = lax.rem(step, jnp.int32(config.stages))
        plgpu.barrier_wait(smem["k_full"].at[stage])

        def scores_of(accumulator):
            plgpu.wgmma(accumulator, queries, smem["k_smem"].at[stage].T)
            return accumulator[...]

        scores = scale * pl.run_scoped(scores_of, plgpu.ACC((ROWS, config.block), jnp.float32))
        plgpu.barrier_arrive(smem["k_free"].at[stage])
        if masked:
            column = plgpu.broadcasted_iota(
                jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA
            ) + ((split + step * config.splits) * config.block)
            spread = [lax.broadcast_in_dim(word, scores.shape, (0,)) for word in words]
            seen = frame.visible(layout, column, spread, prefix)
            scores = jnp.where(seen, scores, jnp.float32(frame.NEVER))
        weights, decay, top, total = frame.online_softmax(scores, top, total)
        out = out * lax.broadcast_in_dim(decay, out.shape, (0,))
        weights = weights.astype(dtype)
        plgpu.barrier_wait(smem["v_full"].at[stage])
        block_values = smem["v_smem"].at[stage]
        if layout.interpret is None:

            def add(accumulator):
                plgpu.wgmma(accumulator, weights, block_values)

            out = pl.run_state(add)(plgpu.ACC.init(out))
        else:  # the interpreter has no wgmma whose left operand is in registers
            product = jnp.dot(weights.astype(jnp.float32), block_values[...].astype(jnp.float32))
            out = out + product
        plgpu.barrier_arrive(smem["v_free"].at[stage])
        return out, top, total

    carry = (
        constant((ROWS, channels), 0.0, plgpu.Layout.WGMMA),
        constant((ROWS,), frame.NEVER, by_row),
        constant((ROWS,), 0.0, by_row),
    )
    num_full = jnp.minimum(num_full, count)
    carry = lax.fori_loop(0, num_full, functools.partial(one_block, masked=False), carry)
    return lax.fori_loop(num_full, count, functools.partial(one_block, masked=True), carry)
