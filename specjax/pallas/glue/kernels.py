"""The kernels of this folder, in Mosaic GPU. Each thread block has one row; its 128 threads share the channels."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_THREADS = 128
# Layouts as the kernel states them. Where Mosaic infers them, each load is one recursion deeper: too deep for the 160
# buffers of a 70B model, and minutes for fewer.
_STATED_LAYOUTS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


def _vector(size: int):
    """Layout of a row: as many neighbours per thread as one load can take."""
    width = next(width for width in (8, 4, 2, 1) if size % (_THREADS * width) == 0)
    return plgpu.Layout.WG_STRIDED((size,), vec_size=width)


def _added(ref, row, columns, layout):
    """The sum of a row's parts, in their order."""
    total = plgpu.load(ref.at[0, row, columns], layout=layout)
    for part in range(1, ref.shape[0]):
        total = total + plgpu.load(ref.at[part, row, columns], layout=layout)
    return total


def residual_norm(sums, x, gain, *, eps: float, interpret=None):
    """sums [P, R, N], x [M, D], gain [D] -> (x + sum, its RMS norm), both [M, D] in the dtype of x."""
    rows, size = x.shape
    layout = _vector(size)

    def body(sums_ref, x_ref, gain_ref, out_ref, normed_ref):
        row = lax.axis_index("row")
        added = _added(sums_ref, row, pl.ds(0, size), layout).astype(x_ref.dtype)
        total = plgpu.load(x_ref.at[row], layout=layout) + added
        out_ref[row] = total
        total = total.astype(jnp.float32)
        scale = lax.rsqrt(jnp.sum(total * total) / size + eps)
        weight = plgpu.load(gain_ref, layout=layout).astype(jnp.float32)
        normed_ref[row] = (total * scale * weight).astype(x_ref.dtype)

    out = jax.ShapeDtypeStruct((rows, size), x.dtype)
    run = plgpu.kernel(
        body,
        out_type=[out, out],
        grid=(rows,),
        grid_names=("row",),
        kernel_name="residual_norm",
        interpret=interpret,
    )
    return run(sums, x, gain)


def rotate_and_write(
    sums, cos, sin, keys, values, start, *, heads: int, num_rows: int, interpret=None
):
    """Projections to queries, and rows of the cache: rotary embedding on the way.

    Args:
        sums: [P, R, N] parts of the fused projection, rows in the order of sequence and node.
        cos, sin: [B, T, C]; the sines of the first half of the channels negated.
        keys, values: caches [B, K, S, C]; slots start[b] + t are written.
        num_rows: rows of the packed queries.
    Returns:
        queries [B, K, num_rows, C], row t * (H / K) + g, zeros behind; keys and values (in place). What would lie
        beyond the cache's slots is dropped.
    """
    batch, kv_heads, capacity, channels = keys.shape
    nodes, group, dtype = cos.shape[1], heads // kv_heads, keys.dtype
    layout, used = _vector(channels), cos.shape[1] * (heads // kv_heads)

    def body(sums_ref, cos_ref, sin_ref, start_ref, keys_ref, values_ref, q_ref, smem):
        row, head = lax.axis_index("row"), lax.axis_index("head")
        sequence, node = lax.div(row, nodes), lax.rem(row, nodes)
        x = _added(sums_ref, row, pl.ds(head * channels, channels), layout).astype(dtype)
        slot = start_ref[sequence] + node

        @pl.when((head >= heads + kv_heads) & (slot < capacity))
        def _value():
            values_ref[sequence, head - heads - kv_heads, slot] = x

        @pl.when(head < heads + kv_heads)
        def _rotated():
            exact = x.astype(jnp.float32)
            # Written twice, one behind the other: half a head further on are the partners of all channels.
            smem[pl.ds(0, channels)] = exact
            smem[pl.ds(channels, channels)] = exact
            partner = plgpu.load(smem.at[pl.ds(channels // 2, channels)], layout=layout)
            cosine = plgpu.load(cos_ref.at[sequence, node], layout=layout)
            sine = plgpu.load(sin_ref.at[sequence, node], layout=layout)
            rotated = (exact * cosine + partner * sine).astype(dtype)

            @pl.when(head < heads)
            def _query():
                where = node * group + lax.rem(head, group)
                q_ref[sequence, lax.div(head, group), where] = rotated
                for spare in range(used, num_rows, used):

                    @pl.when(where + spare < num_rows)
                    def _(spare=spare):
                        empty = plgpu.layout_cast(jnp.zeros((channels,), dtype), layout)
                        q_ref[sequence, lax.div(head, group), where + spare] = empty

            @pl.when((head >= heads) & (slot < capacity))
            def _key():
                keys_ref[sequence, head - heads, slot] = rotated

    keys_ref, values_ref = jax.new_ref(keys), jax.new_ref(values)
    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, kv_heads, num_rows, channels), dtype),
        scratch_types=[plgpu.SMEM((2 * channels,), jnp.float32)],
        grid=(batch * nodes, heads + 2 * kv_heads),
        grid_names=("row", "head"),
        kernel_name="rotate_and_write",
        interpret=interpret,
    )
    queries = run(sums, cos, sin, start, keys_ref, values_ref)
    return queries, jax.freeze(keys_ref), jax.freeze(values_ref)


def combine(out, top, total, *, nodes: int, group: int, dtype, interpret=None):
    """The splits of an attention, weighed by their maxima and added in order.

    Args:
        out: [splits, B, K, R, C] unnormalized sums, row t * group + g; top, total: their maxima and sums of weights.
    Returns:
        [B, nodes, K * group, C] in `dtype`.
    """
    splits, batch, kv_heads, _, channels = out.shape
    heads = kv_heads * group
    layout = _vector(channels)

    def body(out_ref, top_ref, total_ref, result_ref):
        sequence, node, head = (lax.axis_index(name) for name in ("sequence", "node", "head"))
        kv_head, row = lax.div(head, group), node * group + lax.rem(head, group)
        tops = [top_ref[split, sequence, kv_head, row] for split in range(splits)]
        best = tops[0]
        for value in tops[1:]:
            best = jnp.maximum(best, value)
        norm, summed = None, None
        for split, value in enumerate(tops):
            weight = jnp.exp2(value - best)
            part = plgpu.load(out_ref.at[split, sequence, kv_head, row], layout=layout) * weight
            share = total_ref[split, sequence, kv_head, row] * weight
            norm = share if norm is None else norm + share
            summed = part if summed is None else summed + part
        # A row that sees nothing has weight 0 everywhere.
        result_ref[sequence, node, head] = (summed / jnp.maximum(norm, 1e-30)).astype(dtype)

    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, nodes, heads, channels), dtype),
        grid=(batch, nodes, heads),
        grid_names=("sequence", "node", "head"),
        kernel_name="combine_splits",
        interpret=interpret,
    )
    return run(out, top, total)


def move_rows(buffers, start, path, *, interpret=None):
    """Slot start + path[j] -> slot start + j in every buffer [B, K, S, C]; in place, all in one launch.

    A thread block has one head of one buffer: it reads all rows before it writes one. Rows beyond the slots are
    neither read (the last slot is, in their place) nor written.
    """
    batch, kv_heads, capacity, channels = buffers[0].shape
    length = path.shape[1]
    layout = _vector(channels)

    def body(start_ref, path_ref, *refs):
        index, sequence, head = (lax.axis_index(n) for n in ("buffer", "sequence", "head"))
        first = start_ref[sequence]
        slots = [
            jnp.minimum(first + path_ref[sequence, j], jnp.int32(capacity - 1))
            for j in range(length)
        ]

        for number, ref in enumerate(refs):

            @pl.when(index == number)
            def _(ref=ref):
                rows = [plgpu.load(ref.at[sequence, head, slot], layout=layout) for slot in slots]
                for j, row in enumerate(rows):

                    @pl.when(first + j < capacity)
                    def _(j=j, row=row):
                        ref[sequence, head, first + j] = row

    refs = [jax.new_ref(buffer) for buffer in buffers]
    run = plgpu.kernel(
        body,
        out_type=(),
        grid=(len(buffers), batch, kv_heads),
        grid_names=("buffer", "sequence", "head"),
        kernel_name="move_rows",
        interpret=interpret,
        compiler_params=_STATED_LAYOUTS,
    )
    run(start, path, *refs)
    return [jax.freeze(ref) for ref in refs]
