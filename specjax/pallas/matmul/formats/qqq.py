"""QQQ: signed 4-bit codes, whose group scales make int8 weights under one float scale per channel.

| runtime weight | weight in floats |
|---|---|
| r = round_half_even(c * scales[g]), an int8 | r * channel_scales |

Per channel (no `channel_scales`) these are plain int4 codes, with scales = 16 * s_channel: QQQ's
kernel leaves nibbles shifted by four bits.

In registers codes become float16 as in `int4`; the low byte of c * scale + 1536 is
round_half_even(c * scale).
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, Shaped

from specjax.pallas.matmul.formats.base import Variant
from specjax.pallas.matmul.formats.int4 import Int4
from specjax.pallas.matmul.formats.kernel import Widening
from specjax.pallas.matmul.operand import Operand
from specjax.pallas.matmul.weight import QuantizedWeight, grouped

# `$0`, `$1` are results, `$2` is the word of codes, `$3` a pair of equal float16 scales.
_TO_SCALED_INT8 = """{
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
# float16 holds every integer up to here, which the assembly relies on.
_LARGEST_SCALE = 16.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class QQQ(Int4):
    """With `channel_scales`; `registry.of` takes weights without them for int4."""

    levels: str = "qqq"
    two_level: ClassVar[bool] = True
    scales_in_registers: ClassVar[bool] = True

    def random_tables(
        self, rng: np.random.Generator, outputs: int, groups: int
    ) -> dict[str, np.ndarray]:
        return dict(
            scales=rng.uniform(0.5, 15.8, (outputs, groups)).astype(np.float16),
            channel_scales=rng.uniform(0.001, 0.003, outputs).astype(np.float32),
        )

    def runtime(self, weight: QuantizedWeight) -> tuple[Int8[Array, "N K"], Float[Array, "N 1"]]:
        product = grouped(jnp.asarray(weight.codes).astype(jnp.float32), weight.group_size)
        product = jnp.round(product * weight.scales.astype(jnp.float32)[..., None])
        codes = jnp.clip(product, -128, 127).astype(jnp.int8).reshape(weight.codes.shape)
        return codes, weight.channel_scales.astype(jnp.float32)[:, None]

    def refuses_values(self, weight: QuantizedWeight) -> str | None:
        scales = weight.scales.astype(jnp.float32)
        if bool(jnp.any(scales.astype(jnp.float16).astype(jnp.float32) != scales)):
            return "second-level scales of qqq are not float16 values"
        if bool(jnp.any(jnp.abs(scales) > _LARGEST_SCALE)):
            return f"second-level scales of qqq exceed {_LARGEST_SCALE:g}: int8 would clip"
        return None

    def stored_scales(self, scales: Shaped[Array, "N G"]) -> Float[Array, "N G"]:
        return scales.astype(jnp.float16)

    def operand_dtype(self, input_dtype, arch: tuple[int, int]):
        del input_dtype, arch
        return jnp.int8

    def factor(self, operand: Operand) -> int:
        del operand
        return 1

    def widening(self, operand: Operand) -> Widening | None:
        del operand
        return Widening(_TO_SCALED_INT8, 2)

    def widened(
        self, stored: Int8[Array, "N K"], operand: Operand, scales: Float[Array, "N"] | None
    ) -> Int8[Array, "N K"]:
        del operand
        product = stored.astype(jnp.float32) * scales.astype(jnp.float32)[:, None]
        return jnp.round(product).astype(jnp.int8)

    def variants(self) -> tuple[Variant, ...]:
        return (
            Variant(name="qqq-g128", input_bits=8, group_size=128, scale_dtype="float32"),
            Variant(name="qqq-g128", input_bits=4, group_size=128),
        )


FORMATS = (QQQ(),)
