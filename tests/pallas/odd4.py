"""Odd integers of 4 bits: code c stands for 2c + 1, a symmetric grid of 16 values without a zero."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from specjax.pallas.matmul.formats.base import Variant
from specjax.pallas.matmul.formats.int4 import Int4
from specjax.pallas.matmul.formats.kernel import Widening


@dataclasses.dataclass(frozen=True, kw_only=True)
class Odd4(Int4):
    """Stored and ordered as int4; no Triton kernel reads it."""

    levels: str = "odd"
    triton: ClassVar[str | None] = None

    def values(self, codes, dtype):
        one, two = (jnp.asarray(number, dtype) for number in (1, 2))
        return codes.astype(dtype) * two + one

    def operand_dtype(self, input_dtype, arch):
        return jnp.int8

    def factor(self, operand):
        return 8 if operand.bits == 8 else 1

    def widening(self, operand):
        assembly, words = super().widening(operand)
        if operand.bits == 8:  # 8 (2c + 1) = 16 c + 8
            more = [f"xor.b32 ${i}, ${i}, 0x08080808;" for i in range(words)]
        else:
            suffix, one = ("f16x2", 0x3C00) if operand.dtype == jnp.float16 else ("bf16x2", 0x3F80)
            more = [
                f".reg .b32 two, unit; mov.b32 two, 0x40004000; mov.b32 unit, {one * 0x10001:#x};",
                *(f"fma.rn.{suffix} ${i}, ${i}, two, unit;" for i in range(words)),
            ]
        return Widening(assembly.rstrip("}") + "\n".join(more) + "\n}", words)

    def variants(self):
        return (Variant(name="odd-g128", input_bits=16, group_size=128),)


FORMATS = (Odd4(),)
