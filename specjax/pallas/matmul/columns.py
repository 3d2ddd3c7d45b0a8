"""Column orders of packed codes: what a thread loads as one word is what its matrix instruction reads.

A warp of the tensor core holds a 16 x 8 piece of the weight as pairs of columns per thread (16-bit
operands) or quadruples (8-bit operands). Codes are narrower than operands, so one 32-bit load
brings a thread the columns of several pieces. The orders below permute the columns inside blocks
of `BLOCK`, once and offline, so that those columns are the thread's own and widening a code is a
mask and at most one shift, without any exchange between threads.

With q the thread's place among the four that share a row:

| codes | operands | stored column | original column | |
|---|---|---|---|---|
| 4 bits | 16 bits | 8q + 4h + i | 8i + 2q + h | nibbles i and i + 4 of a word are one pair |
| 4 bits | 8 bits | 8q + 2e + j | 16j + 4q + e | even and odd nibbles are two quadruples |
| 8 bits | 16 bits | 16b + 8r + 4p + 2i + h | 16b + 8i + 4p + 2r + h | q = 2p + r, halves of a word are pairs |
| as operands | 8 or 4 bits | any | the same | |

The same orders serve wgmma (Hopper) and mma.sync (Ampere, Ada): their fragments agree.
"""

import jax.numpy as jnp
from jaxtyping import Array, Shaped

BLOCK = 32

# (bits of a code, bits of an operand) -> extents of the original column index, and its transposition.
_ORDERS = {
    (4, 16): ((4, 4, 2), (1, 2, 0)),
    (4, 8): ((2, 4, 4), (1, 2, 0)),
    (8, 16): ((2, 2, 2, 2, 2), (0, 3, 2, 1, 4)),
    (8, 8): ((32,), (0,)),
    (4, 4): ((32,), (0,)),
}


def to_memory(
    columns: Shaped[Array, "*rows K"], code_bits: int, operand_bits: int
) -> Shaped[Array, "*rows K"]:
    """The columns in the order in which they are stored; K is a multiple of `BLOCK`."""
    extents, transposition = _ORDERS[code_bits, operand_bits]
    return _permuted(columns, extents, transposition)


def from_memory(
    columns: Shaped[Array, "*rows K"], code_bits: int, operand_bits: int
) -> Shaped[Array, "*rows K"]:
    """The inverse of `to_memory`."""
    extents, transposition = _ORDERS[code_bits, operand_bits]
    stored = tuple(extents[axis] for axis in transposition)
    inverse = tuple(transposition.index(axis) for axis in range(len(transposition)))
    return _permuted(columns, stored, inverse)


def _permuted(columns, extents: tuple[int, ...], transposition: tuple[int, ...]):
    *rows, width = columns.shape
    blocks = columns.reshape(*rows, width // BLOCK, *extents)
    kept = len(rows) + 1
    axes = (*range(kept), *(kept + axis for axis in transposition))
    return jnp.transpose(blocks, axes).reshape(*rows, width)
