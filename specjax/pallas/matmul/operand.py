"""Where a widened weight goes: the operand of a matrix instruction."""

import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operand:
    """The left operand of a matrix instruction.

    Attributes:
        dtype: float16, bfloat16, int8, or int4 (unit "mma" before Hopper only).
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
        """Of one element."""
        return dtype_bits(self.dtype)


def dtype_bits(dtype) -> int:
    """Bits of one element of an integer or floating-point dtype, 4-bit ones included."""
    kind = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    return kind(dtype).bits
