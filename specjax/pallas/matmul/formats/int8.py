"""8-bit integers under one level of scales, signed or unsigned.

| operands | per word of four codes |
|---|---|
| float16 | byte ^ 128 under 0x64 is 1152 + c; subtract |
| bfloat16 | low seven bits under 0x4300, minus 128 or 256 chosen by the sign bit |
| int8 | the word as it is |

sm_80 has no bfloat16 subtraction: the same as a fused multiply-add with -1.

Columns of a block for 16-bit operands: 16b + 8r + 4p + 2i + h is stored of 16b + 8i + 4p + 2r + h,
where q = 2p + r is the thread's place among the four that share a row and halves of a word are pairs.
"""

import dataclasses

import jax.numpy as jnp

from specjax.pallas.matmul.columns import IDENTITY, Order
from specjax.pallas.matmul.formats.base import Variant
from specjax.pallas.matmul.formats.kernel import KernelFormat, Widening
from specjax.pallas.matmul.operand import Operand

# `$0`, `$1` are results, `$2` is the word.
_TO_FLOAT16 = """{
    .reg .b32 w, b<2>, c<2>;
    xor.b32 w, $2, 0x80808080;
    mov.b32 c0, 0x64646464; mov.b32 c1, 0x64806480;
    prmt.b32 b0, w, c0, 0x4140; prmt.b32 b1, w, c0, 0x4342;
    sub.f16x2 $0, b0, c1; sub.f16x2 $1, b1, c1;
}"""
_TO_BFLOAT16 = """{
    .reg .b32 b<2>, m<2>, n<2>, one;
    prmt.b32 b0, $2, 0, 0x4140; prmt.b32 b1, $2, 0, 0x4342;
    lop3.b32 m0, b0, 0x007F007F, 0x43004300, 0xea; lop3.b32 m1, b1, 0x007F007F, 0x43004300, 0xea;
    lop3.b32 n0, b0, 0x00800080, 0x43004300, 0xea; lop3.b32 n1, b1, 0x00800080, 0x43004300, 0xea;
    %s
}"""
_SUB_SIGN = "sub.bf16x2 $0, m0, n0; sub.bf16x2 $1, m1, n1;"
_FMA_SIGN = "mov.b32 one, 0xbf80bf80; fma.rn.bf16x2 $0, n0, one, m0; fma.rn.bf16x2 $1, n1, one, m1;"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8(KernelFormat):
    """`code_dtype` is int8, or uint8 with zeros or minima."""

    code_dtype: str = "int8"

    def order(self, operand_bits: int) -> Order:
        return {16: Order((2, 2, 2, 2, 2), (0, 3, 2, 1, 4)), 8: IDENTITY}[operand_bits]

    def widening(self, operand: Operand) -> Widening | None:
        if operand.bits == 8:
            return None
        if operand.dtype == jnp.float16:
            return Widening(_TO_FLOAT16, 2)
        return Widening(_TO_BFLOAT16 % (_SUB_SIGN if operand.arch[0] >= 9 else _FMA_SIGN), 2)

    def variants(self) -> tuple[Variant, ...]:
        if not self.signed:
            return (Variant(name="zeros", input_bits=16, group_size=128, zeros=True),)
        return (
            Variant(input_bits=16, group_size=-1),
            Variant(name="g128", input_bits=16, group_size=128),
            Variant(input_bits=8, group_size=-1, scale_dtype="float32"),
            Variant(name="g128", input_bits=8, group_size=128, scale_dtype="float32"),
        )


FORMATS = (Int8(), Int8(code_dtype="uint8"))
