"""Codes to matrix-instruction operands in registers: masks, shifts and one float operation per pair.

Codes arrive in the column order of their format, so that every word a thread loaded becomes whole
fragments of its own. Which instructions do it is the format's `widening`; here is which registers
hold what.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from specjax.pallas.matmul.formats.kernel import KernelFormat
from specjax.pallas.matmul.operand import Operand

_Layout = plgpu.Layout


def layout(operand: Operand):
    """The layout of the operand."""
    if operand.unit == "mma":
        return _Layout.MMA_LHS(operand.dtype)
    return _Layout.WGMMA if operand.bits == 16 else _Layout.WGMMA_8BIT


def load_layout(code_bits: int, operand: Operand):
    """The layout in which stored codes are loaded."""
    if code_bits == operand.bits:
        return layout(operand)
    return _Layout.WGMMA_UPCAST_4X if code_bits == 4 else _Layout.WGMMA_UPCAST_2X


def row_layout(operand: Operand):
    """The layout of one value per row of the operand, as the accumulator's rows have it."""
    if operand.unit == "mma":
        return _Layout.MMA_ACC(operand.dtype).reduce(1)
    return _Layout.WGMMA.reduce(1)


def widen(codes, format: KernelFormat, operand: Operand, scales=None):
    """Codes [64, k] in `load_layout`, k a multiple of 32, as an operand of the product.

    The values are what the codes stand for, times `format.factor`; with `scales` (float16 [64], over
    all k) the int8 weights that a format with `scales_in_registers` makes of both.
    """
    widening = format.widening(operand)
    if widening is None:
        return codes
    if operand.emulate:
        stored = format.order(operand.bits).from_memory(codes.astype(jnp.int8))
        return format.widened(stored, operand, scales)
    layouts_in = (load_layout(format.bits, operand), row_layout(operand))

    @plgpu.inline_mgpu(
        arg_types=layouts_in[: 1 if scales is None else 2],
        return_type=plgpu.ShapeDtypeStruct(codes.shape, operand.dtype, layout(operand)),
    )
    def widened(_, stored, *rows):
        pieces = {}
        for index, register in np.ndenumerate(stored.registers):
            words = [_bitcast(register, _i32())]
            if rows:
                words.append(_pair(rows[0].registers[index[0], 0, index[4], 0, 0]))
            for i, word in enumerate(_inline(widening.assembly, widening.words, words)):
                pieces[index[0], index[1] * widening.words + i, index[4]] = word
        return _assemble(pieces, stored.shape, operand)

    return widened(codes) if scales is None else widened(codes, scales)


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _bitcast(value, to):
    return mgpu.utils.bitcast(value, to)


def _pair(register) -> ir.Value:
    """A vector of one float16 as a word of two."""
    scalar = vector.extract(register, [], [0])
    both = ir.VectorType.get((2,), scalar.type)
    return _bitcast(vector.broadcast(both, scalar), _i32())


def _inline(asm: str, count: int, words: list) -> list:
    result = llvm.StructType.get_literal([_i32()] * count)
    constraints = ",".join(["=r"] * count + ["r"] * len(words))
    struct = llvm.inline_asm(result, words, asm, constraints)
    return [llvm.extractvalue(_i32(), struct, (i,)) for i in range(count)]


def piece_of(index: tuple[int, ...], unit: str) -> tuple[int, int, int]:
    """(64 rows, piece of 8 or 16 columns, half of 16 rows) that an operand's register holds."""
    return index[0], index[1] if unit == "wgmma" else 2 * index[1] + index[3], index[4]


def _assemble(pieces: dict, shape: tuple[int, ...], operand: Operand):
    """Words by `piece_of`, put where the operand's layout has them."""
    held = layout(operand).to_mgpu()
    element = mgpu.utils.dtype_to_ir_type(jnp.dtype(operand.dtype))
    word = ir.VectorType.get((32 // operand.bits,), element)
    registers = np.empty(held.registers_shape(shape), dtype=object)
    for index in np.ndindex(registers.shape):
        registers[index] = _bitcast(pieces[piece_of(index, operand.unit)], word)
    signed = True if jnp.issubdtype(operand.dtype, jnp.integer) else None
    return mgpu.FragmentedArray(_registers=registers, _layout=held, _is_signed=signed)
