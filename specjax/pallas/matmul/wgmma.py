"""Few rows times a packed weight on Hopper: weights in registers are the left operand of wgmma.

A block owns `TILE` outputs, one part of the inputs and up to 64 rows: out^T = W x^T, so that few
rows waste no more than the padding to 8.

    warp group 2 (one warp)   TMA of codes, x and tables into a ring of stages
    warp groups 0, 1          64 outputs each: load codes, widen them in registers, wgmma against x
                              in shared memory; group scales on the float32 (or int32) accumulator

While the tensor core multiplies one unit of inputs, the next one is widened.
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
from specjax.pallas.matmul.ring import COMPUTE_GROUPS, ROWS, Ring, rings, sums_columns

_Layout = plgpu.Layout
_PRODUCER_REGISTERS, _COMPUTE_REGISTERS = 40, 232


def partial_sums(plan: Plan, inputs: dict[str, jax.Array], *, name: str, interpret=None):
    """The sums [splits, plan.rows, outputs] of each part of the inputs, outputs padded to tiles.

    `inputs` holds x [rows, inputs], codes, the tables of `plan.tables`, and "sums" [units, rows]
    where `plan.uses_sums`.
    """
    names = tuple(inputs)
    outputs, config = plan.form.n_tiles * TILE, plan.config
    if "sums" in inputs:
        spare = -plan.rows % sums_columns(plan.m_tile)
        inputs = inputs | {"sums": jnp.pad(inputs["sums"], ((0, 0), (0, spare)))}
    memory = rings(plan, {key: array.dtype for key, array in inputs.items()})
    return plgpu.kernel(
        functools.partial(_body, plan, names),
        out_type=jax.ShapeDtypeStruct((config.splits, plan.rows, outputs), plan.out_dtype),
        scratch_types=dict(
            ring={key: _shared(memory[key], inputs[key].dtype) for key in names},
            out_smem=_shared(memory["out"], plan.out_dtype),
            full=plgpu.Barrier(num_arrivals=len(names), num_barriers=config.num_stages),
            empty=plgpu.Barrier(num_arrivals=COMPUTE_GROUPS, num_barriers=config.num_stages),
        ),
        grid=(plan.form.n_tiles, config.splits, plan.rows // plan.m_tile),
        grid_names=("n", "split", "m"),
        num_threads=COMPUTE_GROUPS + 1,
        thread_name="group",
        kernel_name=name,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(*inputs.values())


def _shared(ring: Ring, dtype):
    transforms = ()
    if ring.swizzle:
        transforms = (
            plgpu.TilingTransform((8, ring.swizzle * 8 // ring.bits)),
            plgpu.SwizzleTransform(ring.swizzle),
        )
    return plgpu.SMEM((ring.slots, *ring.shape), dtype, transforms=transforms)


def _body(plan: Plan, names: tuple[str, ...], *refs, ring, out_smem, full, empty):
    inputs, out_gmem = dict(zip(names, refs[:-1], strict=True)), refs[-1]
    n, split, m = (lax.axis_index(axis) for axis in ("n", "split", "m"))
    group = lax.axis_index("group")
    first, count = plan.steps(split)

    @pl.when(group == COMPUTE_GROUPS)
    def _():
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")

        @plgpu.warp_map
        def _(warp):
            @pl.when(warp == 0)
            def _():
                _produce(plan, inputs, ring, full, empty, (n, m, first, count))

    @pl.when(group < COMPUTE_GROUPS)
    def _():
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        rows = pl.ds(group * ROWS, ROWS)
        consume = _consume_groups if plan.group else _consume_whole
        total = consume(plan, ring, full, empty, rows, count)
        out_smem.at[group].T[...] = plgpu.layout_cast(
            folding.finish(plan, total), _Layout.WGMMA_TRANSPOSED
        )
        plgpu.commit_smem()
        where = (split, pl.ds(m * plan.m_tile, plan.m_tile), pl.ds(n * TILE + group * ROWS, ROWS))
        plgpu.copy_smem_to_gmem(out_smem.at[group], out_gmem.at[where])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _produce(plan: Plan, inputs, ring, full, empty, block) -> None:
    n, m, first, count = block
    tiles, units = plan.config.tiles_per_step, plan.units_per_step
    rows = pl.ds(m * plan.m_tile, plan.m_tile)

    @pl.loop(0, count)
    def _(step):
        slot = lax.rem(step, plan.config.num_stages)

        @pl.when(step >= plan.config.num_stages)
        def _():
            plgpu.barrier_wait(empty.at[slot])

        tile = (first + step) * tiles
        unit = pl.ds((first + step) * units, units)
        sources = dict(
            codes=(n, pl.ds(tile, tiles)),
            x=(rows, pl.ds(tile * TILE, tiles * TILE)),
            sums=(unit, pl.ds(m * plan.m_tile, sums_columns(plan.m_tile))),
        )
        for key, source in inputs.items():
            where = sources.get(key, (n, unit))
            plgpu.copy_gmem_to_smem(source.at[where], ring[key].at[slot], full.at[slot])

    # Every completion of a barrier is awaited, as the interpreter demands of a sound protocol.
    @pl.loop(jnp.maximum(count - plan.config.num_stages, 0), count)
    def _(step):
        plgpu.barrier_wait(empty.at[lax.rem(step, plan.config.num_stages)])


def _widened(plan: Plan, ring, slot, rows, unit: int):
    """The left operand of one unit of inputs: 64 outputs, widened in registers."""
    column = unit * plan.unit
    codes = plgpu.load(
        ring["codes"].at[slot, column // TILE, rows],
        layout=registers.load_layout(plan.format.bits, plan.operand),
    )
    if plan.unit < TILE:
        codes = codes[:, column % TILE : column % TILE + plan.unit]
    scales = (
        _table(plan, ring, slot, rows, unit, "scales") if plan.format.scales_in_registers else None
    )
    return registers.widen(codes, plan.format, plan.operand, scales)


def _table(plan: Plan, ring, slot, rows, unit: int, key: str):
    """The entries of one unit for the group's outputs."""
    return plgpu.load(ring[key].at[slot, unit, rows], layout=registers.row_layout(plan.operand))


def _sums(plan: Plan, ring, slot, unit: int):
    ref = ring["sums"].at[slot, unit, pl.ds(0, plan.m_tile)]
    return plgpu.load(ref, layout=_Layout.WGMMA.reduce(0))


def _columns(plan: Plan, ring, slot, unit: int):
    return ring["x"].at[slot, :, pl.ds(unit * plan.unit, plan.unit)]


def _emulated_product(plan: Plan, weight, x):
    """The interpreter has no wgmma with a register operand."""
    contract = (((1,), (1,)), ((), ()))
    return lax.dot_general(weight.astype(plan.acc_dtype), x.astype(plan.acc_dtype), contract)


def _zeros(plan: Plan, dtype):
    return plgpu.layout_cast(jnp.zeros((ROWS, plan.m_tile), dtype), _Layout.WGMMA)


def _release(plan: Plan, barrier) -> None:
    """Gives a stage back to the producer.

    The interpreter asks for a fence between loads and the TMA write that follows them. On the
    device the values have arrived in registers before the arrival that the write waits for.
    """
    if plan.operand.emulate:
        plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)


def _consume_whole(plan: Plan, ring, full, empty, rows, count):
    """One accumulator over all inputs."""

    def run(step, multiply, finish):
        slot = lax.rem(step, plan.config.num_stages)
        plgpu.barrier_wait(full.at[slot])
        for unit in range(plan.units_per_step):
            multiply(_widened(plan, ring, slot, rows, unit), _columns(plan, ring, slot, unit))
        finish()
        _release(plan, empty.at[slot])

    if plan.operand.emulate:

        def emulated(step, total):
            parts = []
            run(step, lambda w, x: parts.append(_emulated_product(plan, w, x[...])), lambda: None)
            return functools.reduce(jnp.add, parts, total)

        return lax.fori_loop(0, count, emulated, _zeros(plan, plan.acc_dtype))

    def scoped(acc):
        @pl.loop(0, count)
        def _(step):
            run(step, lambda w, x: plgpu.wgmma(acc, w, x.T), functools.partial(plgpu.wgmma_wait, 0))

        return acc[...]

    return pl.run_scoped(scoped, plgpu.ACC((ROWS, plan.m_tile), plan.acc_dtype))


def _consume_groups(plan: Plan, ring, full, empty, rows, count):
    """One accumulator per group, scaled and added up in the order of the groups."""
    units = plan.units_per_step

    def body(step, total):
        slot = lax.rem(step, plan.config.num_stages)
        plgpu.barrier_wait(full.at[slot])
        weight = _widened(plan, ring, slot, rows, 0)
        for unit in range(units):
            following = None
            if unit + 1 < units:
                following = functools.partial(_widened, plan, ring, slot, rows, unit + 1)
            x = _columns(plan, ring, slot, unit)
            part, weight = _multiply(plan, weight, x, following)
            table = functools.partial(_table, plan, ring, slot, rows, unit)
            sums = functools.partial(_sums, plan, ring, slot, unit)
            total = folding.add_group(plan, total, part, table, sums)
        _release(plan, empty.at[slot])
        return total

    return lax.fori_loop(0, count, body, _zeros(plan, plan.sum_dtype))


def _multiply(plan: Plan, weight, x, following):
    """The product of one unit, and the next unit's operand, widened meanwhile."""
    if plan.operand.emulate:
        product = _emulated_product(plan, weight, x[...])
        return product, None if following is None else following()

    def scoped(acc):
        plgpu.wgmma(acc, weight, x.T)
        ahead = () if following is None else (following(),)
        plgpu.wgmma_wait(0)
        return acc[...], *ahead

    part, *ahead = pl.run_scoped(scoped, plgpu.ACC((ROWS, plan.m_tile), plan.acc_dtype))
    return part, ahead[0] if ahead else None
