"""Every slot that TMA reads or writes lies where TMA can, whatever the format, the weight, the rows and the tiles."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from specjax.pallas import device
from specjax.pallas.matmul import mosaic, ring, specs, tiles
from specjax.pallas.matmul.form import STEP_TILES
from specjax.pallas.matmul.operand import Operand
from specjax.pallas.matmul.plan import Config, Plan

HOPPER = (9, 0)
GPU = tiles.typical(HOPPER)


@functools.cache
def weight_of(spec):
    return spec.weight()


def plan_of(spec, rows: int, dtype, config: Config | None = None) -> Plan:
    """The plan of `mosaic.matmul` for rows and a spec."""
    weight = weight_of(spec)
    floats = spec.operand_bits == 16
    inputs = jnp.dtype(dtype if floats else f"int{spec.variant.input_bits}")
    operand = inputs if floats else spec.format.operand_dtype(inputs, HOPPER)
    operand = Operand(dtype=jnp.dtype(operand), unit="wgmma", arch=HOPPER)
    tile = mosaic.m_tile(rows, operand.bits, HOPPER)
    op = spec.format.op(spec.variant.input_bits)
    plan = Plan(
        form=weight.form,
        operand=operand,
        config=config or tiles.lookup(op, weight.form, tile, operand.bits, GPU),
        rows=-(-rows // tile) * tile,
        m_tile=tile,
        has_zeros=weight.zeros is not None,
        has_minima=floats and weight.minima is not None,
        out_dtype=jnp.dtype(jnp.float32),
    )
    return dataclasses.replace(plan, out_dtype=jnp.dtype(plan.sum_dtype))


def rings_of(plan: Plan, spec) -> dict[str, ring.Ring]:
    weight = weight_of(spec)
    dtypes = dict(x=plan.operand.dtype, codes=jnp.int8)
    dtypes |= {table: getattr(weight, table).dtype for table in plan.tables}
    if plan.uses_sums:
        dtypes["sums"] = plan.acc_dtype
    return ring.rings(plan, dtypes)


@pytest.mark.parametrize("op", specs.ops())
def test_every_slot_is_aligned_and_the_stages_fit(op):
    """All weights of all formats, all row tiles, with the tiles that a GPU gets and with all others."""
    for spec in specs.of(op).values():
        form = weight_of(spec).form
        for rows in range(8, 72, 8):
            plan = plan_of(spec, rows, jnp.float16)
            used = sum(r.slots * r.slot_bytes for r in rings_of(plan, spec).values())
            assert used <= device.SHARED_MEMORY[HOPPER], spec.name
            for steps in (t for t in STEP_TILES if form.split_tiles % t == 0):
                config = Config(tiles_per_step=steps, num_stages=2, splits=1)
                planned = plan_of(spec, rows, jnp.bfloat16, config)
                for each in rings_of(planned, spec).values():
                    assert each.slot_bytes % 128 == 0, (spec.name, each)
                    assert each.slot_bytes % (8 * each.swizzle or 1) == 0, (spec.name, each)


def test_weights_with_sums_come_with_every_step():
    """What was once misaligned is among the specs: sums, one or two tiles a step, few rows."""
    found = {
        plan.config.tiles_per_step
        for op in specs.ops()
        for spec in specs.of(op).values()
        if (plan := plan_of(spec, 8, jnp.float16)).uses_sums
    }
    assert found == set(STEP_TILES)


def test_a_slot_that_tma_cannot_reach_is_named():
    sums = ring.Ring(name="sums", slots=3, shape=(1, 8), bits=32)
    with pytest.raises(RuntimeError, match=r"ring of sums has slots of 32 bytes \(1, 8\).*128"):
        sums.check()
    with pytest.raises(RuntimeError, match=r"ring of x has slots of 512 bytes.*1024"):
        ring.Ring(name="x", slots=3, shape=(4, 64), bits=16, swizzle=128).check()


def test_the_check_stands_before_the_kernel(monkeypatch):
    """Sums that are copied by the row tile alone are refused when the kernel is traced."""
    spec = specs.of("matmul_w4a16")["llama3-8b/o/zeros/576 inputs"]
    arguments = spec.arguments(3)

    def run(x, weight):
        return mosaic.matmul(x, weight, arch=HOPPER)

    jax.eval_shape(run, **arguments)
    monkeypatch.setattr(ring, "sums_columns", lambda m_tile: m_tile)
    with pytest.raises(RuntimeError, match="ring of sums"):
        jax.eval_shape(lambda x, weight: run(x, weight), **arguments)
