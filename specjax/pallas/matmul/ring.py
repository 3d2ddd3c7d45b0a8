"""What the Hopper skeleton keeps in shared memory: the slots that TMA copies into and out of.

TMA takes addresses in shared memory that are multiples of 128 bytes, of swizzled arrays multiples of
the swizzle's period. Mosaic aligns an array, but not the slots inside it, and the interpreter has
no addresses at all: on the device a wrong one ends the process. So slots are described here once,
allocated from that description, and checked before a kernel is traced.
"""

import dataclasses
import math
from collections.abc import Mapping

from specjax.pallas.matmul.form import TILE
from specjax.pallas.matmul.operand import dtype_bits
from specjax.pallas.matmul.plan import Plan

COMPUTE_GROUPS = 2
# Outputs of one compute group.
ROWS = TILE // COMPUTE_GROUPS
_ALIGNMENT = 128
# Rows after which a swizzle repeats.
_PERIOD = 8
_SUMS_BITS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
    """An array in shared memory.

    Attributes:
        name: of what lies in it.
        slots: copies that are in flight at a time.
        shape: of a slot, which one TMA copy fills or empties.
        bits: of an element.
        swizzle: bytes of a swizzled line; 0: rows lie one behind the other.
    """

    name: str
    slots: int
    shape: tuple[int, ...]
    bits: int
    swizzle: int = 0

    @property
    def slot_bytes(self) -> int:
        return math.prod(self.shape) * self.bits // 8

    def check(self) -> None:
        """Raises RuntimeError where TMA cannot reach every slot: a fault of this package."""
        alignment = max(_ALIGNMENT, _PERIOD * self.swizzle)
        if self.slot_bytes % alignment:
            raise RuntimeError(
                f"internal error: the ring of {self.name} has slots of {self.slot_bytes} bytes "
                f"{self.shape}; TMA needs multiples of {alignment}"
            )


def rings(plan: Plan, dtypes: Mapping[str, object]) -> dict[str, Ring]:
    """One ring per input of the kernel, and "out", all of them checked.

    Args:
        dtypes: of the inputs, by their names in `wgmma.partial_sums`.

    Raises:
        RuntimeError: TMA cannot copy one of them.
    """
    found = {key: _stage(plan, key, dtype_bits(dtype)) for key, dtype in dtypes.items()}
    found["out"] = Ring(
        name="out",
        slots=COMPUTE_GROUPS,
        shape=(plan.m_tile, ROWS),
        bits=dtype_bits(plan.out_dtype),
        swizzle=128,
    )
    for ring in found.values():
        ring.check()
    return found


def sums_columns(m_tile: int) -> int:
    """Rows of inputs whose group sums are copied at once: the sums of a unit fill whole lines."""
    line = _ALIGNMENT * 8 // _SUMS_BITS
    return -(-m_tile // line) * line


def _stage(plan: Plan, key: str, bits: int) -> Ring:
    tiles, swizzle = plan.config.tiles_per_step, 0
    if key == "codes":
        bits = plan.format.bits
        shape, swizzle = (tiles, TILE, TILE), TILE * bits // 8
    elif key == "x":
        # A unit's columns of x are one operand, so no swizzle may reach beyond them.
        bits = plan.operand.bits
        shape, swizzle = (plan.m_tile, tiles * TILE), min(128, plan.unit * bits // 8)
    else:
        shape = (plan.units_per_step, sums_columns(plan.m_tile) if key == "sums" else TILE)
    return Ring(name=key, slots=plan.config.num_stages, shape=shape, bits=bits, swizzle=swizzle)
