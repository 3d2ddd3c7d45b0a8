"""Column orders of packed codes: what a thread loads as one word is what its matrix instruction reads.

A warp of the tensor core holds a 16 x 8 piece of the weight as pairs of columns per thread (16-bit
operands) or quadruples (8-bit operands). Codes are narrower than operands, so one 32-bit load
brings a thread the columns of several pieces. An order permutes the columns inside blocks of
`BLOCK`, once and offline, so that those columns are the thread's own and widening a code is a mask
and at most one shift, without any exchange between threads. Each format states its orders.

The same orders serve wgmma (Hopper) and mma.sync (Ampere, Ada): their fragments agree.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Shaped

BLOCK = 32


@dataclasses.dataclass(frozen=True)
class Order:
    """A permutation of the columns of a block.

    Attributes:
        extents: of the digits of the original column index; their product is `BLOCK`.
        transposition: the digits in the order in which they make up the stored index.
    """

    extents: tuple[int, ...]
    transposition: tuple[int, ...]

    def to_memory(self, columns: Shaped[Array, "*rows K"]) -> Shaped[Array, "*rows K"]:
        """The columns in the order in which they are stored; K is a multiple of `BLOCK`."""
        return _permuted(columns, self.extents, self.transposition)

    def from_memory(self, columns: Shaped[Array, "*rows K"]) -> Shaped[Array, "*rows K"]:
        """The inverse of `to_memory`."""
        stored = tuple(self.extents[axis] for axis in self.transposition)
        axes = range(len(self.transposition))
        return _permuted(columns, stored, tuple(self.transposition.index(axis) for axis in axes))


IDENTITY = Order((BLOCK,), (0,))


def _permuted(columns, extents: tuple[int, ...], transposition: tuple[int, ...]):
    *rows, width = columns.shape
    blocks = columns.reshape(*rows, width // BLOCK, *extents)
    kept = len(rows) + 1
    axes = (*range(kept), *(kept + axis for axis in transposition))
    return jnp.transpose(blocks, axes).reshape(*rows, width)
