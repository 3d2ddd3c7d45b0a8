"""QoQ (QServe): unsigned 4-bit codes, whose integer group scales and zeros make int8 weights.

| runtime weight | weight in floats |
|---|---|
| r = int8(c * scales[g] + zeros[g]), wrapping | r * channel_scales |

Per channel (no `channel_scales`) these are plain uint4 codes with minima = -s1_szeros. The kernels
never make r: sums of groups are integers, and zeros go to the group sums of the inputs.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8, Integer, Shaped

from specjax.pallas.matmul.formats.base import Variant
from specjax.pallas.matmul.formats.int4 import Int4
from specjax.pallas.matmul.weight import QuantizedWeight, grouped


@dataclasses.dataclass(frozen=True, kw_only=True)
class QoQ(Int4):
    """With `channel_scales`; `registry.of` takes weights without them for uint4."""

    code_dtype: str = "uint4"
    levels: str = "qoq"
    two_level: ClassVar[bool] = True
    integer_groups: ClassVar[bool] = True

    def random_tables(
        self, rng: np.random.Generator, outputs: int, groups: int
    ) -> dict[str, np.ndarray]:
        return dict(
            scales=rng.integers(1, 9, (outputs, groups)).astype(np.int8),
            zeros=rng.integers(-128, 8, (outputs, groups)).astype(np.int8),
            channel_scales=rng.uniform(0.001, 0.003, outputs).astype(np.float32),
        )

    def runtime(self, weight: QuantizedWeight) -> tuple[Int8[Array, "N K"], Float[Array, "N 1"]]:
        product = grouped(jnp.asarray(weight.codes).astype(jnp.int32), weight.group_size)
        product = product * weight.scales.astype(jnp.int32)[..., None]
        product += weight.zeros.astype(jnp.int32)[..., None]
        codes = (product + 128) % 256 - 128
        codes = codes.astype(jnp.int8).reshape(weight.codes.shape)
        return codes, weight.channel_scales.astype(jnp.float32)[:, None]

    def refuses_values(self, weight: QuantizedWeight) -> str | None:
        codes = grouped(jnp.asarray(weight.codes).astype(jnp.int32), weight.group_size)
        scales, zeros = weight.scales.astype(jnp.int32), weight.zeros.astype(jnp.int32)
        ends = jnp.stack([codes.min(axis=-1), codes.max(axis=-1)]) * scales + zeros
        if bool(jnp.any((ends < -128) | (ends > 127))):
            return "the int8 weights of qoq wrap around"
        return None

    def stored_zeros(
        self, zeros: Integer[Array, "N G"], scales: Shaped[Array, "N G"]
    ) -> Int[Array, "N G"]:
        """half * scale + zero."""
        return zeros.astype(jnp.int16) + jnp.int16(self.half) * scales.astype(jnp.int16)

    def restored_zeros(
        self, stored: Int[Array, "N G"], scales: Shaped[Array, "N G"]
    ) -> Int[Array, "N G"]:
        return stored - jnp.int16(self.half) * scales.astype(jnp.int16)

    def variants(self) -> tuple[Variant, ...]:
        return (
            Variant(name="qoq-g128", input_bits=8, group_size=128, scale_dtype="int8", zeros=True),
            Variant(name="qoq-per-channel", input_bits=8, group_size=-1, minima=True),
        )


FORMATS = (QoQ(),)
