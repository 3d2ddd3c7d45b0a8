"""Global and shared memory, with what must not be done to them."""

import numpy as np

from tests.ptx.faults import Fault
from tests.ptx.order import Order

# Not 0, so that a wrong base is out of bounds.
SHARED_BASE = 1024
# Shared memory is watched in units of so many bytes.
_UNIT = 2
_BUFFER_BITS = 40
_POISON = 0xFF  # NaN in every float format


def buffer_address(number: int) -> int:
    """Address of the first byte of a buffer; no two buffers are within reach of each other."""
    return (number + 1) << _BUFFER_BITS


class Global:
    """Buffers of bytes."""

    def __init__(self, buffers: list[np.ndarray]):
        self.buffers = buffers

    def _places(self, addresses: np.ndarray, size: int, align: int, what: str):
        numbers = addresses >> np.uint64(_BUFFER_BITS)
        number = int(numbers[0])
        if (numbers != number).any() or not 1 <= number <= len(self.buffers):
            raise Fault(f"{what} outside of every buffer: {hex(int(addresses[0]))}")
        buffer = self.buffers[number - 1]
        offsets = (addresses & np.uint64((1 << _BUFFER_BITS) - 1)).astype(np.int64)
        if (offsets % align).any():
            raise Fault(f"{what} is misaligned: offset {offsets.max()} of {align} bytes")
        if int(offsets.max()) + size > len(buffer):
            raise Fault(f"{what} out of bounds: {offsets.max() + size} of {len(buffer)} bytes")
        return buffer, offsets[:, None] + np.arange(size)

    def read(self, addresses: np.ndarray, size: int, align: int) -> np.ndarray:
        """Bytes [n, size]."""
        buffer, places = self._places(addresses, size, align, "load from global memory")
        return buffer[places]

    def write(self, addresses: np.ndarray, data: np.ndarray, align: int) -> None:
        size = data.shape[1]
        buffer, places = self._places(addresses, size, align, "store to global memory")
        buffer[places] = data


class Shared:
    """Shared memory of a block; addresses begin at `SHARED_BASE`.

    Attributes:
        content: bytes.
        order: of the block.
    """

    def __init__(self, size: int, order: Order):
        self.size, self.order = size, order
        self.content = np.full(size, 0xCD, np.uint8)
        units = -(-size // _UNIT)
        self._written = np.zeros(units, bool)
        self._writer, self._wrote = np.zeros(units, np.int16), np.zeros(units, np.int32)
        self._unfenced = np.full(units, -1, np.int16)
        self._read: dict[int, np.ndarray] = {}

    def places(self, addresses: np.ndarray, size: int, align: int, what: str) -> np.ndarray:
        """Offsets [n, size] of checked addresses [n]."""
        offsets = addresses.astype(np.int64) - SHARED_BASE
        if ((offsets + SHARED_BASE) % align).any():
            raise Fault(f"{what} is misaligned: {int(addresses.max())} of {align} bytes")
        if int(offsets.min()) < 0 or int(offsets.max()) + size > self.size:
            raise Fault(f"{what} out of bounds: {int(offsets.max()) + size} of {self.size} bytes")
        return offsets[:, None] + np.arange(size)

    def read(self, warps: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Bytes at `places` [n, size] for threads of `warps` [n]."""
        units = places[:, ::_UNIT] // _UNIT
        self._check_reads(warps, units, "load")
        clocks = self.order.known[warps, warps]
        for warp in np.unique(warps):
            mine = warps == warp
            self._reads_of(int(warp))[units[mine]] = clocks[mine][0]
        return self.content[places]

    def write(self, warps: np.ndarray, places: np.ndarray, data: np.ndarray) -> None:
        """Stores of threads; not seen by the asynchronous proxy before a fence."""
        units = places[:, ::_UNIT] // _UNIT
        self._check_writes(warps, units, "store")
        self.content[places] = data
        column = np.broadcast_to(warps[:, None], units.shape)
        self._written[units], self._writer[units] = True, column
        self._wrote[units] = self.order.known[warps, warps][:, None]
        self._unfenced[units] = column

    def fence(self, warps: np.ndarray) -> None:
        """`fence.proxy.async` of these warps."""
        self._unfenced[np.isin(self._unfenced, warps)] = -1

    def reserve(self, warp: int, places: np.ndarray, agent: int, clock: int, what: str) -> None:
        """An asynchronous write is on its way; undefined until `clock` of `agent` was waited for."""
        units = np.unique(places // _UNIT)
        self._check_writes(np.array([warp]), units[None], what)
        self._written[units], self._writer[units], self._wrote[units] = True, agent, clock
        self._unfenced[units] = -1
        self.content[places] = _POISON

    def lend(
        self, warps: np.ndarray, places: np.ndarray, agent: int, clock: int, what: str
    ) -> None:
        """An asynchronous read is on its way, until `clock` of `agent` was waited for."""
        units = np.unique(places // _UNIT)
        self._check_reads(warps, np.broadcast_to(units, (len(warps), len(units))), what)
        if (self._unfenced[units] >= 0).any():
            raise Fault(f"{what} reads what was stored without fence.proxy.async")
        self._reads_of(agent)[units] = clock

    def _reads_of(self, component: int) -> np.ndarray:
        if component not in self._read:
            self._read[component] = np.zeros(len(self._written), np.int32)
        return self._read[component]

    def _check_reads(self, warps, units, what: str) -> None:
        if not self._written[units].all():
            raise Fault(f"{what} reads shared memory that nothing wrote")
        self._check(warps, units, self._writer[units], self._wrote[units], what, "the write")

    def _check_writes(self, warps, units, what: str) -> None:
        self._check(warps, units, self._writer[units], self._wrote[units], what, "a write")
        for component, clocks in self._read.items():
            self._check(warps, units, np.int16(component), clocks[units], what, "a read")

    def _check(self, warps, units, component, clock, what: str, other: str) -> None:
        unknown = self.order.known[warps[:, None], component] < clock
        if unknown.any():
            row, column = np.argwhere(unknown)[0]
            who = self.order.name(int(np.broadcast_to(component, unknown.shape)[row, column]))
            place = int(units[row, column]) * _UNIT
            raise Fault(
                f"race: {what} of warp {warps[row]} at byte {place} of shared memory and {other} by {who} are unordered"
            )
