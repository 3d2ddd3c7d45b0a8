"""Copies of boxes of an array (TMA) and how shared memory is swizzled."""

from dataclasses import dataclass

import numpy as np

from tests.ptx.decode import PARAMETER_BASE, PARAMETER_BITS
from tests.ptx.faults import Fault, Unsupported

MAP_BYTES = 128
_SWIZZLES = {16: 0, 32: 0x10, 64: 0x30, 128: 0x70}
# By the number that the host passes to the driver.
ELEMENT_BITS = {0: 4, 1: 8, 2: 16, 3: 32, 4: 64, 5: 16, 6: 32, 7: 16}


def swizzled(addresses: np.ndarray, span: int) -> np.ndarray:
    """Where a byte of a row lies; rows of `span` bytes exchange their chunks of 16 bytes in a pattern of 8 rows."""
    return addresses ^ ((addresses >> 3) & _SWIZZLES[span])


@dataclass(frozen=True)
class TensorMap:
    """What `cuTensorMapEncodeTiled` is told, outermost axis first.

    Attributes:
        buffer: number of the array.
        element: bytes of one.
        sizes, strides: in elements and in bytes.
        box: elements that one copy moves.
        swizzle: span in bytes; 16 is none.
    """

    buffer: int
    element: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int

    @classmethod
    def encode(cls, buffer: int, bits: int, sizes, strides, box, swizzle: int) -> "TensorMap":
        """Checks what the driver checks; int4 is copied as bytes."""
        sizes, strides, box = list(sizes), list(strides), list(box)
        if bits == 4:
            if sizes[-1] % 2 or box[-1] % 2:
                raise Fault("tensor map: an odd number of 4-bit elements")
            sizes[-1], box[-1], bits = sizes[-1] // 2, box[-1] // 2, 8
            strides = [stride // 2 for stride in strides[:-1]] + [1]
        element = bits // 8
        strides = tuple(stride * element for stride in strides)
        inner = box[-1] * element
        if swizzle not in _SWIZZLES:
            raise Unsupported(f"tensor map: swizzle {swizzle}")
        if any(stride % 16 or stride >= 1 << 40 for stride in strides[:-1]):
            raise Fault(f"tensor map: strides {strides} are no multiples of 16 bytes")
        if any(not 1 <= edge <= 256 for edge in box) or inner % 16:
            raise Fault(f"tensor map: box {box} of {element} bytes")
        if swizzle > 16 and inner > swizzle:
            raise Fault(f"tensor map: a row of {inner} bytes exceeds the swizzle of {swizzle}")
        return cls(buffer, element, tuple(sizes), strides, tuple(box), swizzle)

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.element

    def source(self, corner: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Offsets in the buffer of the box's bytes, and which of them exist."""
        offsets, exist = np.zeros(self.box, np.int64), np.ones(self.box, bool)
        for axis, (first, edge) in enumerate(zip(corner, self.box, strict=True)):
            places = first + np.arange(edge)
            shape = [edge if other == axis else 1 for other in range(len(self.box))]
            offsets = offsets + (places * self.strides[axis]).reshape(shape)
            exist = exist & ((places >= 0) & (places < self.sizes[axis])).reshape(shape)
        offsets = offsets[..., None] + np.arange(self.element)
        return offsets.reshape(-1), np.repeat(exist.reshape(-1), self.element)

    def shared_places(self, block, address: int, what: str) -> np.ndarray:
        """Offsets of the box's bytes in shared memory."""
        if address % 128:
            raise Fault(f"{what}: address {address} in shared memory is no multiple of 128")
        whole = block.shared.places(np.array([address], np.uint64), self.bytes, 128, what)[0]
        base = address - int(whole[0])
        return swizzled(whole + base, self.swizzle) - base


def _box(ins, place: int):
    """The operand `[map, {coordinates}]`: (block, thread) -> tensor map and corner, outermost first."""
    text = ins.operands[place].strip("[] ")
    name, _, inside = text.partition(",")
    pointer = ins.reader(name.strip(), "u64")
    numbers = [ins.reader(part.strip(), "s32") for part in inside.strip(" {}").split(",")]

    def read(block, one):
        offset = int(pointer(block, one)[0]) - PARAMETER_BASE
        number, offset = offset >> PARAMETER_BITS, offset & ((1 << PARAMETER_BITS) - 1)
        names = ins.program.parameters
        maps = block.parameters.get(names[number]) if 0 <= number < len(names) else None
        if not isinstance(maps, list) or offset % MAP_BYTES or offset // MAP_BYTES >= len(maps):
            raise Fault("the copy's first operand is no tensor map")
        tensor_map = maps[offset // MAP_BYTES]
        corner = [int(number(block, one)[0]) for number in numbers][::-1]
        if len(corner) != len(tensor_map.box):
            raise Fault(f"{len(corner)} coordinates for {len(tensor_map.box)} axes")
        return tensor_map, corner

    return read


def copy_in(ins, rank: str):
    """A box into shared memory; its bytes count towards a barrier."""
    into, box, barrier_at = ins.address(0), _box(ins, 1), ins.address(2)

    def run(block, where, index):
        for thread in block.threads[where]:
            one = slice(thread, thread + 1)
            tensor_map, corner = box(block, one)
            warp = np.array([thread // 32])
            barrier = block.barriers.at(int(barrier_at(block, one)[0]), warp)
            if not barrier.visible:
                raise Fault("a copy completes on an mbarrier that no fence made visible to it")
            places = tensor_map.shared_places(block, int(into(block, one)[0]), "TMA load")
            clock = barrier.phases + 1
            block.shared.reserve(int(warp[0]), places, barrier.agent, clock, "TMA load")
            block.finish(_arriving(block, tensor_map, corner, places, barrier))
        block.wake()

    return run


def _arriving(block, tensor_map, corner, places, barrier):
    def arrive():
        offsets, exist = tensor_map.source(corner)
        data = np.zeros(tensor_map.bytes, np.uint8)
        data[exist] = block.memory.buffers[tensor_map.buffer][offsets[exist]]
        block.shared.content[places] = data
        barrier.bytes -= tensor_map.bytes
        barrier.settle()

    return arrive


def copy_out(ins, rank: str):
    """A box of shared memory into an array, as part of the warp's group of stores."""
    box, source = _box(ins, 0), ins.address(1)

    def run(block, where, index):
        for thread in block.threads[where]:
            one, key = slice(thread, thread + 1), ("stores", int(thread) // 32)
            tensor_map, corner = box(block, one)
            places = tensor_map.shared_places(block, int(source(block, one)[0]), "TMA store")
            clock, agent = block.flight.groups[key].clock, block.order.agent(key)
            block.shared.lend(np.array([thread // 32]), places, agent, clock, "TMA store")
            block.flight.begin(key, _leaving(block, tensor_map, corner, places))

    return run


def _leaving(block, tensor_map, corner, places):
    def leave():
        offsets, exist = tensor_map.source(corner)
        data = block.shared.content[places]
        block.memory.buffers[tensor_map.buffer][offsets[exist]] = data[exist]

    return leave
