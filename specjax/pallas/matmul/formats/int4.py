"""4-bit integers under one level of scales, signed or unsigned.

The exact integers come out of a word, scales are applied later:

| operands | per word of eight codes |
|---|---|
| float16 | nibble ^ 8 under exponent 0x6400 is 1032 + c, a byte's upper one under 0x6480 is |
| | 1152 + 16 c: subtract, or multiply by 1/16 and subtract |
| bfloat16 | nibble ^ 8 under 0x4300 is 136 + c; subtract |
| int8 | mask the upper nibbles of the word and of the word << 4: 16 c |
| int4 | the word as it is |

sm_80 has no bfloat16 subtraction: the same as a fused multiply-add with 1.

With q the thread's place among the four that share a row, columns of a block are stored so:

| operands | stored column | original column | |
|---|---|---|---|
| 16 bits | 8q + 4h + i | 8i + 2q + h | nibbles i and i + 4 of a word are one pair |
| 8 bits | 8q + 2e + j | 16j + 4q + e | even and odd nibbles are two quadruples |
| 4 bits | any | the same | |
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from specjax.pallas.matmul.columns import IDENTITY, Order
from specjax.pallas.matmul.formats.base import Variant
from specjax.pallas.matmul.formats.kernel import KernelFormat, Widening
from specjax.pallas.matmul.operand import Operand

# `$0 .. $3` are results, `$4` is the word; the look-up table 0x6a of lop3 is (a & b) ^ c.
_TO_FLOAT16 = """{
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
_TO_BFLOAT16 = """{
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
_TO_INT8 = """{
    .reg .b32 s;
    shl.b32 s, $2, 4; and.b32 $0, s, 0xF0F0F0F0; and.b32 $1, $2, 0xF0F0F0F0;
}"""
# By which int8 operands exceed the codes.
_SHIFTED = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4(KernelFormat):
    """`code_dtype` is int4, or uint4 with zeros or minima."""

    code_dtype: str = "int4"
    triton: ClassVar[str | None] = "specjax.pallas.matmul.formats.int4_triton"

    def order(self, operand_bits: int) -> Order:
        return {
            16: Order((4, 4, 2), (1, 2, 0)),
            8: Order((2, 4, 4), (1, 2, 0)),
            4: IDENTITY,
        }[operand_bits]

    def operand_dtype(self, input_dtype, arch: tuple[int, int]):
        # Hopper's mma.sync only emulates int4.
        return jnp.int4 if input_dtype == jnp.int4 and arch[0] == 8 else jnp.int8

    def factor(self, operand: Operand) -> int:
        return _SHIFTED if operand.bits == 8 else 1

    def widening(self, operand: Operand) -> Widening | None:
        if operand.bits == 4:
            return None
        if operand.dtype == jnp.int8:
            return Widening(_TO_INT8, 2)
        if operand.dtype == jnp.float16:
            return Widening(_TO_FLOAT16, 4)
        return Widening(_TO_BFLOAT16 % (_SUB_136 if operand.arch[0] >= 9 else _FMA_136), 4)

    def variants(self) -> tuple[Variant, ...]:
        if not self.signed:
            return (
                Variant(name="zeros", input_bits=16, group_size=128, zeros=True),
                Variant(name="minima-g32", input_bits=16, group_size=32, minima=True),
                Variant(name="zeros-g128", input_bits=8, group_size=128, zeros=True),
            )
        return (
            Variant(input_bits=16, group_size=128),
            Variant(name="per-channel", input_bits=16, group_size=-1),
            Variant(name="g64", input_bits=16, group_size=64),
            Variant(name="g32", input_bits=16, group_size=32),
            Variant(input_bits=8, group_size=-1, scale_dtype="float32"),
            Variant(name="g128", input_bits=8, group_size=128),
            Variant(name="g64", input_bits=8, group_size=64),
            Variant(input_bits=4, group_size=128),
            Variant(name="per-channel", input_bits=4, group_size=-1),
        )


FORMATS = (Int4(), Int4(code_dtype="uint4"))
