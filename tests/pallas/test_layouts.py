"""Column orders of packed codes, and that widening in registers lands every code where it belongs."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from specjax.pallas.matmul import registers
from specjax.pallas.matmul.columns import BLOCK
from specjax.pallas.matmul.formats import registry
from specjax.pallas.matmul.operand import Operand
from tests.pallas import fragments

ORDERS = [(4, 16), (4, 8), (8, 16), (8, 8)]
# The tables of the formats: stored and original column by the indices of a block.
TABLE = {
    (4, 16): (lambda q, h, i: (8 * q + 4 * h + i, 8 * i + 2 * q + h), (4, 2, 4)),
    (4, 8): (lambda q, e, j: (8 * q + 2 * e + j, 16 * j + 4 * q + e), (4, 4, 2)),
    (8, 16): (
        lambda b, r, p, i, h: (
            16 * b + 8 * r + 4 * p + 2 * i + h,
            16 * b + 8 * i + 4 * p + 2 * r + h,
        ),
        (2, 2, 2, 2, 2),
    ),
}
SHAPE = (64, 128)


def order_of(code_bits: int, operand_bits: int):
    return registry.find(f"int{code_bits}", "single").order(operand_bits)


@pytest.mark.parametrize(("code_bits", "operand_bits"), ORDERS)
def test_orders_stay_in_blocks_and_invert(code_bits, operand_bits):
    columns = jnp.arange(6 * BLOCK).reshape(2, 3 * BLOCK)
    order = order_of(code_bits, operand_bits)
    stored = order.to_memory(columns)
    blocks = np.asarray(stored).reshape(2, 3, BLOCK)
    np.testing.assert_array_equal(np.sort(blocks, axis=-1), columns.reshape(blocks.shape))
    np.testing.assert_array_equal(order.from_memory(stored), columns)


@pytest.mark.parametrize("order", TABLE)
def test_table(order):
    stored = np.asarray(order_of(*order).to_memory(jnp.arange(BLOCK)))
    formula, extents = TABLE[order]
    pairs = [formula(*index) for index in np.ndindex(*extents)]
    assert len({place for place, _ in pairs}) == BLOCK
    assert all(stored[place] == column for place, column in pairs)


@pytest.mark.parametrize("unit", ["wgmma", "mma"])
@pytest.mark.parametrize(
    ("code_bits", "dtype"), [(4, jnp.float16), (4, jnp.bfloat16), (4, jnp.int8), (8, jnp.float16)]
)
def test_every_register_holds_its_columns(code_bits, dtype, unit):
    """For all threads: words as loaded, widened, are the operand of the matrix instruction."""
    operand = Operand(dtype=jnp.dtype(dtype), unit=unit, arch=(9, 0))
    format = registry.find(f"int{code_bits}", "single")
    count = format.widening(operand).words
    loaded_layout = registers.load_layout(code_bits, operand).to_mgpu()
    order = np.asarray(format.order(operand.bits).to_memory(jnp.arange(SHAPE[1])))
    for warp, lane in np.ndindex(4, 32):
        loaded = fragments.registers(loaded_layout, SHAPE, warp, lane)
        pieces = {}
        for index, elements in loaded.items():
            rows, stored = np.divmod(elements, SHAPE[1])
            originals = rows * SHAPE[1] + order[stored]
            for i in range(count):
                chosen = originals[fragments.sources(code_bits, operand.bits, i)]
                pieces[index[0], index[1] * count + i, index[4]] = chosen
        wanted = fragments.registers(registers.layout(operand).to_mgpu(), SHAPE, warp, lane)
        for index, elements in wanted.items():
            np.testing.assert_array_equal(pieces[registers.piece_of(index, unit)], elements)


@pytest.mark.parametrize("unit", ["wgmma", "mma"])
def test_second_level_scales_belong_to_the_rows_of_codes(unit):
    operand = Operand(dtype=jnp.dtype(jnp.int8), unit=unit, arch=(9, 0))
    codes_layout = registers.load_layout(4, operand).to_mgpu()
    rows_layout = registers.row_layout(operand).to_mgpu()
    for warp, lane in np.ndindex(4, 32):
        rows = fragments.registers(rows_layout, SHAPE[:1], warp, lane)
        for index, elements in fragments.registers(codes_layout, SHAPE, warp, lane).items():
            row = rows[index[0], 0, index[4], 0, 0]
            np.testing.assert_array_equal(elements // SHAPE[1], np.repeat(row, len(elements)))


def test_int8_codes_are_int8_operands():
    operand = Operand(dtype=jnp.dtype(jnp.int8), unit="wgmma", arch=(9, 0))
    loaded = registers.load_layout(8, operand)
    assert loaded == registers.layout(operand) == plgpu.Layout.WGMMA_8BIT
