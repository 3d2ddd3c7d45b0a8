"""Codes to matrix-instruction operands in registers: masks, shifts and one float operation per pair.

Codes arrive in the column order of `layouts`, so that every word a thread loaded becomes whole
fragments of its own. The exact integers come out, scales are applied later:

| codes -> operands | per word of 32 bits |
|---|---|
| 4 bits -> float16 | nibble ^ 8 under exponent 0x6400 is 1032 + c, a byte's upper one under 0x6480 is |
| | 1152 + 16 c: subtract, or multiply by 1/16 and subtract |
| 4 bits -> bfloat16 | nibble ^ 8 under 0x4300 is 136 + c; subtract |
| 4 bits -> int8 | mask the upper nibbles of the word and of the word << 4: 16 c |
| 4 bits -> int8, scaled | first to float16; the low byte of c * scale + 1536 is round_half_even(c * scale) |
| 8 bits -> float16 | byte ^ 128 under 0x64 is 1152 + c; subtract |
| 8 bits -> bfloat16 | low seven bits under 0x4300, minus 128 or 256 chosen by the sign bit |

sm_80 has no bfloat16 subtraction: the same as a fused multiply-add with 1.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from specjax.pallas.matmul import columns

_Layout = plgpu.Layout

# `$0 .. $3` are results, `$4` is the word; the look-up table 0x6a of lop3 is (a & b) ^ c.
_INT4_TO_FLOAT16 = """{
    .reg .b32 s, b<4>, c<3>;
    shr.u32 s, $4, 8;
    lop3.b32 b0, $4, 0x000F000F, 0x64086408, 0x6a;
    lop3.b32 b1, $4, 0x00F000F0, 0x64806480, 0x6a;
    lop3.b32 b2, s, 0x000F000F, 0x64086408, 0x6a;
    lop3.b32 b3, s, 0x00F000F0, 0x64806480, 0x6a;
    mov.b32 c0, 0x64086408; mov.b32 c1, 0x2c002c00; mov.b32 c2, 0xd480d480;
    sub.f16x2 $0, b0, c0; fma.rn.f16x2 $1, b1, c1, c2;
    sub.f16x2 $2, b2, c0; fma.rn.f16x2 $3, b3, c1, c2;
}"""
_INT4_TO_BFLOAT16 = """{
    .reg .b32 s<4>, b<4>, c, one;
    shr.u32 s1, $4, 4; shr.u32 s2, $4, 8; shr.u32 s3, $4, 12;
    lop3.b32 b0, $4, 0x000F000F, 0x43084308, 0x6a;
    lop3.b32 b1, s1, 0x000F000F, 0x43084308, 0x6a;
    lop3.b32 b2, s2, 0x000F000F, 0x43084308, 0x6a;
    lop3.b32 b3, s3, 0x000F000F, 0x43084308, 0x6a;
    %s
}"""
_SUB_136 = "mov.b32 c, 0x43084308;" + "".join(f" sub.bf16x2 ${i}, b{i}, c;" for i in range(4))
_FMA_136 = "mov.b32 c, 0xc308c308; mov.b32 one, 0x3f803f80;" + "".join(
    f" fma.rn.bf16x2 ${i}, b{i}, one, c;" for i in range(4)
)
# `$2` is the word of codes, `$3` a pair of equal float16 scales.
_INT4_TO_SCALED_INT8 = """{
    .reg .b32 s, b<4>, c<4>;
    shr.u32 s, $2, 8;
    lop3.b32 b0, $2, 0x000F000F, 0x64086408, 0x6a;
    lop3.b32 b1, $2, 0x00F000F0, 0x64806480, 0x6a;
    lop3.b32 b2, s, 0x000F000F, 0x64086408, 0x6a;
    lop3.b32 b3, s, 0x00F000F0, 0x64806480, 0x6a;
    mov.b32 c0, 0x64086408; mov.b32 c1, 0x2c002c00; mov.b32 c2, 0xd480d480; mov.b32 c3, 0x66006600;
    sub.f16x2 b0, b0, c0; fma.rn.f16x2 b1, b1, c1, c2;
    sub.f16x2 b2, b2, c0; fma.rn.f16x2 b3, b3, c1, c2;
    fma.rn.f16x2 b0, b0, $3, c3; fma.rn.f16x2 b1, b1, $3, c3;
    fma.rn.f16x2 b2, b2, $3, c3; fma.rn.f16x2 b3, b3, $3, c3;
    prmt.b32 $0, b0, b2, 0x6240; prmt.b32 $1, b1, b3, 0x6240;
}"""
_INT8_TO_FLOAT16 = """{
    .reg .b32 w, b<2>, c<2>;
    xor.b32 w, $2, 0x80808080;
    mov.b32 c0, 0x64646464; mov.b32 c1, 0x64806480;
    prmt.b32 b0, w, c0, 0x4140; prmt.b32 b1, w, c0, 0x4342;
    sub.f16x2 $0, b0, c1; sub.f16x2 $1, b1, c1;
}"""
_INT8_TO_BFLOAT16 = """{
    .reg .b32 b<2>, m<2>, n<2>, one;
    prmt.b32 b0, $2, 0, 0x4140; prmt.b32 b1, $2, 0, 0x4342;
    lop3.b32 m0, b0, 0x007F007F, 0x43004300, 0xea; lop3.b32 m1, b1, 0x007F007F, 0x43004300, 0xea;
    lop3.b32 n0, b0, 0x00800080, 0x43004300, 0xea; lop3.b32 n1, b1, 0x00800080, 0x43004300, 0xea;
    %s
}"""
_SUB_SIGN = "sub.bf16x2 $0, m0, n0; sub.bf16x2 $1, m1, n1;"
_FMA_SIGN = "mov.b32 one, 0xbf80bf80; fma.rn.bf16x2 $0, n0, one, m0; fma.rn.bf16x2 $1, n1, one, m1;"
_INT4_TO_INT8 = """{
    .reg .b32 s;
    shl.b32 s, $2, 4; and.b32 $0, s, 0xF0F0F0F0; and.b32 $1, $2, 0xF0F0F0F0;
}"""
# Factor by which integer operands exceed the codes, where no scales go in.
INT4_IN_INT8 = 16


@dataclasses.dataclass(frozen=True)
class Operand:
    """Where a widened weight goes.

    Attributes:
        dtype: of the operand: float16, bfloat16, int8, or int4 (unit "mma" before Hopper only).
        unit: "wgmma" (Hopper) or "mma" (mma.sync).
        arch: compute capability; chooses among equivalent instructions.
        emulate: plain array operations instead, for the interpreter.
    """

    dtype: np.dtype
    unit: str
    arch: tuple[int, int]
    emulate: bool = False

    @property
    def bits(self) -> int:
        kind = jnp.iinfo if jnp.issubdtype(self.dtype, jnp.integer) else jnp.finfo
        return kind(self.dtype).bits

    @property
    def layout(self):
        if self.unit == "mma":
            return _Layout.MMA_LHS(self.dtype)
        return _Layout.WGMMA if self.bits == 16 else _Layout.WGMMA_8BIT

    def load_layout(self, code_bits: int):
        """The layout in which stored codes are loaded."""
        if code_bits == self.bits:
            return self.layout
        return _Layout.WGMMA_UPCAST_4X if code_bits == 4 else _Layout.WGMMA_UPCAST_2X


def widen(codes, operand: Operand, scales=None):
    """Codes [64, k] in `operand.load_layout`, k a multiple of 32, as an operand of the product.

    The values are the codes; int8 operands from 4-bit codes are `INT4_IN_INT8` times the codes, or
    with `scales` (float16 [64], over all k) round_half_even(code * scale).
    """
    code_bits = jnp.iinfo(codes.dtype).bits
    if code_bits == operand.bits:
        return codes
    if operand.emulate:
        return _emulated(codes, code_bits, operand, scales)
    asm, count = instructions(code_bits, operand, scales is not None)
    row_layout = operand_rows(operand)
    layouts_in = (operand.load_layout(code_bits), row_layout)[: 1 if scales is None else 2]

    @plgpu.inline_mgpu(
        arg_types=layouts_in,
        return_type=plgpu.ShapeDtypeStruct(codes.shape, operand.dtype, operand.layout),
    )
    def widened(_, stored, *rows):
        pieces = {}
        for index, register in np.ndenumerate(stored.registers):
            words = [_bitcast(register, _i32())]
            if rows:
                words.append(_pair(rows[0].registers[index[0], 0, index[4], 0, 0]))
            for i, word in enumerate(_inline(asm, count, words)):
                pieces[index[0], index[1] * count + i, index[4]] = word
        return _assemble(pieces, stored.shape, operand)

    return widened(codes) if scales is None else widened(codes, scales)


def operand_rows(operand: Operand):
    """The layout of one value per row of the operand, as the accumulator's rows have it."""
    if operand.unit == "mma":
        return _Layout.MMA_ACC(operand.dtype).reduce(1)
    return _Layout.WGMMA.reduce(1)


def _emulated(codes, code_bits: int, operand: Operand, scales):
    values = columns.from_memory(codes.astype(jnp.int8), code_bits, operand.bits)
    if scales is not None:
        product = values.astype(jnp.float32) * scales.astype(jnp.float32)[:, None]
        return jnp.round(product).astype(jnp.int8)
    return values * jnp.int8(INT4_IN_INT8) if operand.bits == 8 else values.astype(operand.dtype)


def instructions(code_bits: int, operand: Operand, scaled: bool) -> tuple[str, int]:
    """The assembly of a conversion and the words it makes of one.

    Word i goes to piece count * j + i, where j counts the loaded words of a row.
    """
    has_sub = operand.arch[0] >= 9
    if operand.dtype == jnp.int8:
        return _INT4_TO_SCALED_INT8 if scaled else _INT4_TO_INT8, 2
    if code_bits == 4:
        if operand.dtype == jnp.float16:
            return _INT4_TO_FLOAT16, 4
        return _INT4_TO_BFLOAT16 % (_SUB_136 if has_sub else _FMA_136), 4
    if operand.dtype == jnp.float16:
        return _INT8_TO_FLOAT16, 2
    return _INT8_TO_BFLOAT16 % (_SUB_SIGN if has_sub else _FMA_SIGN), 2


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
    layout = operand.layout.to_mgpu()
    element = mgpu.utils.dtype_to_ir_type(jnp.dtype(operand.dtype))
    word = ir.VectorType.get((32 // operand.bits,), element)
    registers = np.empty(layout.registers_shape(shape), dtype=object)
    for index in np.ndindex(registers.shape):
        registers[index] = _bitcast(pieces[piece_of(index, operand.unit)], word)
    signed = True if jnp.issubdtype(operand.dtype, jnp.integer) else None
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)
