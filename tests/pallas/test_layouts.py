"""Column orders of packed codes, and that widening in registers lands every code where it belongs."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from specjax.pallas.matmul import columns, registers
from tests.pallas import fragments

ORDERS = [(4, 16), (4, 8), (8, 16), (8, 8)]
# The table of `layouts`: stored and original column by the indices of a block.
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


@pytest.mark.parametrize(("code_bits", "operand_bits"), ORDERS)
def test_orders_stay_in_blocks_and_invert(code_bits, operand_bits):
    original = jnp.arange(6 * columns.BLOCK).reshape(2, 3 * columns.BLOCK)
    stored = columns.to_memory(original, code_bits, operand_bits)
    blocks = np.asarray(stored).reshape(2, 3, columns.BLOCK)
    np.testing.assert_array_equal(np.sort(blocks, axis=-1), original.reshape(blocks.shape))
    np.testing.assert_array_equal(columns.from_memory(stored, code_bits, operand_bits), original)


@pytest.mark.parametrize("order", TABLE)
def test_table(order):
    stored = np.asarray(columns.to_memory(jnp.arange(columns.BLOCK), *order))
    formula, extents = TABLE[order]
    pairs = [formula(*index) for index in np.ndindex(*extents)]
    assert len({place for place, _ in pairs}) == columns.BLOCK
    assert all(stored[place] == column for place, column in pairs)


@pytest.mark.parametrize("unit", ["wgmma", "mma"])
@pytest.mark.parametrize(
    ("code_bits", "dtype"), [(4, jnp.float16), (4, jnp.bfloat16), (4, jnp.int8), (8, jnp.float16)]
)
def test_every_register_holds_its_columns(code_bits, dtype, unit):
    """For all threads: words as loaded, widened, are the operand of the matrix instruction."""
    operand = registers.Operand(dtype=jnp.dtype(dtype), unit=unit, arch=(9, 0))
    _, count = registers.instructions(code_bits, operand, False)
    loaded_layout = operand.load_layout(code_bits).to_mgpu()
    order = np.asarray(columns.to_memory(jnp.arange(SHAPE[1]), code_bits, operand.bits))
    for warp, lane in np.ndindex(4, 32):
        loaded = fragments.registers(loaded_layout, SHAPE, warp, lane)
        pieces = {}
        for index, elements in loaded.items():
            rows, stored = np.divmod(elements, SHAPE[1])
            originals = rows * SHAPE[1] + order[stored]
            for i in range(count):
                chosen = originals[fragments.sources(code_bits, operand.bits, i)]
                pieces[index[0], index[1] * count + i, index[4]] = chosen
        wanted = fragments.registers(operand.layout.to_mgpu(), SHAPE, warp, lane)
        for index, elements in wanted.items():
            np.testing.assert_array_equal(pieces[registers.piece_of(index, unit)], elements)


@pytest.mark.parametrize("unit", ["wgmma", "mma"])
def test_second_level_scales_belong_to_the_rows_of_codes(unit):
    operand = registers.Operand(dtype=jnp.dtype(jnp.int8), unit=unit, arch=(9, 0))
    codes_layout = operand.load_layout(4).to_mgpu()
    rows_layout = registers.operand_rows(operand).to_mgpu()
    for warp, lane in np.ndindex(4, 32):
        rows = fragments.registers(rows_layout, SHAPE[:1], warp, lane)
        for index, elements in fragments.registers(codes_layout, SHAPE, warp, lane).items():
            row = rows[index[0], 0, index[4], 0, 0]
            np.testing.assert_array_equal(elements // SHAPE[1], np.repeat(row, len(elements)))


def test_int8_codes_are_int8_operands():
    operand = registers.Operand(dtype=jnp.dtype(jnp.int8), unit="wgmma", arch=(9, 0))
    assert operand.load_layout(8) == operand.layout == plgpu.Layout.WGMMA_8BIT
