"""What a weight format states for the kernels: packing, column order, widening in registers."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8, Integer, Shaped

from specjax.pallas.matmul.columns import Order
from specjax.pallas.matmul.formats.base import Format
from specjax.pallas.matmul.operand import Operand
from specjax.pallas.matmul.weight import QuantizedWeight


class Widening(NamedTuple):
    """Assembly that turns one loaded word of codes into words of operands.

    Attributes:
        assembly: PTX; `$0`, `$1`, ... are the results, then the word of codes, then (where the format has
            `scales_in_registers`) a word of two equal float16 scales.
        words: results. Result i goes to piece words * j + i, where j counts the loaded words of a row.
    """

    assembly: str
    words: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelFormat(Format):
    """A format of integer codes that the kernels read.

    Codes are stored signed: unsigned ones lose half their range (c = u - 8, or u - 128), and what
    that takes away comes back through the group sums of the inputs:

        sum_k (u - z) x = sum_k c x + (half - z) sum_k x
    """

    # The scales of groups go into the widening, whose result is an int8 weight.
    scales_in_registers: ClassVar[bool] = False
    # Scales and zeros of groups are integers: the sum over groups stays an integer.
    integer_groups: ClassVar[bool] = False
    # Module with the Triton functions `code` and `column`; None: the Triton kernel cannot read the format.
    triton: ClassVar[str | None] = None

    @property
    def signed(self) -> bool:
        """The canonical codes are."""
        return jnp.iinfo(self.code_dtype).min < 0

    @property
    def half(self) -> int:
        """What unsigned codes lose when they are stored signed."""
        return 0 if self.signed else 1 << (self.bits - 1)

    def _quantized_op(self, input_bits: int) -> str:
        return f"matmul_w{self.bits}a{max(input_bits, self.bits)}"

    def backends(self, input_bits: int) -> tuple[str, ...]:
        if input_bits == 16 and self.triton is not None:
            return ("mosaic", "triton", "xla")
        return ("mosaic", "xla")

    def random_tables(
        self, rng: np.random.Generator, outputs: int, groups: int
    ) -> dict[str, np.ndarray]:
        tables = super().random_tables(rng, outputs, groups)
        if not self.signed:
            tables["zeros"] = rng.integers(0, 1 << self.bits, (outputs, groups)).astype(np.uint8)
        return tables

    def refuses_kernels(self) -> str | None:
        return None

    def refuses_values(self, weight: QuantizedWeight) -> str | None:
        """Why the kernels would not reproduce these (concrete) scales and zeros, or None."""
        del weight
        return None

    # Packing.

    def stored(self, codes: Shaped[Array, "N K"]) -> Int8[Array, "N K"]:
        """What is kept of canonical codes: signed, within `bits`."""
        if self.signed:
            return codes.astype(jnp.int8)
        return jax.lax.bitcast_convert_type(
            codes.astype(jnp.uint8) - jnp.uint8(self.half), jnp.int8
        )

    def restored(self, stored: Int8[Array, "N K"]) -> Shaped[Array, "N K"]:
        """The inverse of `stored`."""
        if not self.signed:
            stored = jax.lax.bitcast_convert_type(stored, jnp.uint8) + jnp.uint8(self.half)
        return stored.astype(self.code_dtype)

    def to_bytes(self, stored: Int8[Array, "*rows K"]) -> Shaped[Array, "*rows W"]:
        """int8 as it is; 4-bit codes two per byte, low nibble first."""
        if self.bits == 8:
            return stored
        nibbles = jax.lax.bitcast_convert_type(stored, jnp.uint8) & jnp.uint8(15)
        return nibbles[..., 0::2] | (nibbles[..., 1::2] << jnp.uint8(4))

    def from_bytes(self, packed: Shaped[Array, "*rows W"]) -> Int8[Array, "*rows K"]:
        """The inverse of `to_bytes`."""
        if self.bits == 8:
            return packed
        halves = [_upper_nibbles(packed << jnp.uint8(4)), _upper_nibbles(packed)]
        return jnp.stack(halves, axis=-1).reshape(*packed.shape[:-1], -1)

    def loaded(self, packed: Shaped[Array, "*rows W"]) -> Shaped[Array, "*rows K"]:
        """The bytes in the dtype the kernels load: int4 (a bitcast, no copy) or int8."""
        if self.bits == 8:
            return packed
        return jax.lax.bitcast_convert_type(packed, jnp.int4).reshape(*packed.shape[:-1], -1)

    def stored_scales(self, scales: Shaped[Array, "N G"]) -> Shaped[Array, "N G"]:
        """The scales as the kernels read them."""
        return scales

    def stored_zeros(self, zeros: Integer[Array, "N G"], scales: Shaped[Array, "N G"]):
        """What group sums of the inputs are multiplied by, int16 [N, G]: half - zero."""
        del scales
        return jnp.int16(self.half) - zeros.astype(jnp.int16)

    def restored_zeros(self, stored: Int[Array, "N G"], scales: Shaped[Array, "N G"]):
        """The inverse of `stored_zeros`."""
        del scales
        return jnp.int16(self.half) - stored

    # Column order.

    def order(self, operand_bits: int) -> Order:
        """Of codes that are widened to operands of 16 or 8 bits, or read as they are (4)."""
        raise NotImplementedError

    # Widening.

    def operand_dtype(self, input_dtype, arch: tuple[int, int]):
        """Of the operands that integer inputs of a dtype are multiplied by on a GPU: int8, or int4."""
        del input_dtype, arch
        return jnp.int8

    def factor(self, operand: Operand) -> int:
        """By which widened operands exceed what the stored codes stand for; a power of two."""
        del operand
        return 1

    def widening(self, operand: Operand) -> Widening | None:
        """Stored codes to operands, in the order of `order`; None where codes are operands as they are."""
        raise NotImplementedError

    def widened(
        self, stored: Int8[Array, "N K"], operand: Operand, scales: Float[Array, "N"] | None
    ) -> Shaped[Array, "N K"]:
        """The definition of `widening`, on arrays in the original order of columns."""
        del scales
        return self.values(stored, operand.dtype) * jnp.asarray(self.factor(operand), operand.dtype)


def _upper_nibbles(packed: Shaped[Array, "*rows W"]) -> Int8[Array, "*rows W"]:
    """Sign-extended."""
    return jax.lax.bitcast_convert_type(packed, jnp.int8) >> jnp.int8(4)
