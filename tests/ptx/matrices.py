"""Products of warps and warpgroups: `ldmatrix`, `mma.sync`, `wgmma`."""

import numpy as np

from tests.ptx import values
from tests.ptx.faults import Fault, Unsupported
from tests.ptx.tensors import swizzled

_ROW, _QUAD = np.arange(32) // 4, np.arange(32) % 4
_SPANS = {1: 128, 2: 64, 3: 32}


def load_matrices(ins, count: str, transposed: str):
    """8 x 8 matrices of 16 bits; lanes 8 i to 8 i + 7 have the addresses of the rows of matrix i."""
    number, address = int(count), ins.all_addresses(1)
    puts = [ins.writer(name, "b32") for name in ins.list(0)]
    if len(puts) != number:
        raise Unsupported(f"{ins.statement}")

    def run(block, where, index):
        lanes = np.arange(len(block.threads[where])) % 32 < 8 * number
        addresses = address(block, where)[lanes]
        places = block.shared.places(addresses, 16, 16, "ldmatrix")
        rows = block.shared.read(block.warps[where][lanes], places)
        matrices = rows.view(np.uint16).reshape(-1, number, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        words = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, number, 32)
        for place, put in enumerate(puts):
            put(block, where, words[:, place].reshape(-1))

    return run


def left(registers: np.ndarray) -> np.ndarray:
    """Elements [W, 32, 4, e] of four registers -> matrices [W, 16, 8 e]."""
    warps, _, _, each = registers.shape
    out = np.zeros((warps, 16, 8 * each), registers.dtype)
    for number in range(4):
        rows = _ROW + 8 * (number & 1)
        columns = _QUAD[:, None] * each + np.arange(each) + 4 * each * (number >> 1)
        out[:, rows[:, None], columns] = registers[:, :, number]
    return out


def right(registers: np.ndarray) -> np.ndarray:
    """Elements [W, 32, 2, e] -> matrices [W, 8 e, 8]."""
    warps, _, _, each = registers.shape
    out = np.zeros((warps, 8 * each, 8), registers.dtype)
    for number in range(2):
        inner = _QUAD[:, None] * each + np.arange(each) + 4 * each * number
        out[:, inner, _ROW[:, None]] = registers[:, :, number]
    return out


def _added(product: np.ndarray, before: np.ndarray, kind: str) -> np.ndarray:
    """The accumulator's new numbers; `product` is float64, which holds sums of integers exactly."""
    if kind == "s32":
        return (product.astype(np.int64) + before).astype(np.int32)
    return product + before


def mma(ins, depth: str, result: str, kind: str):
    """m16n8: a warp's product."""
    out, a, b, c = (ins.list(place) for place in range(4))
    a_reads, b_reads = ([ins.reader(name, "b32") for name in names] for names in (a, b))
    c_reads, puts = (
        [ins.reader(name, result) for name in c],
        [ins.writer(name, result) for name in out],
    )
    if int(depth) != 256 // values.bits(kind):
        raise Unsupported(f"{ins.opcode}")

    def run(block, where, index):
        threads = block.threads[where]

        def elements(reads):
            held = [np.broadcast_to(read(block, where), threads.shape) for read in reads]
            found = values.words(held, kind)
            return found.reshape(-1, 32, *found.shape[1:]).astype(np.float64)

        product = left(elements(a_reads)) @ right(elements(b_reads))
        befores = [read(block, where) for read in c_reads]
        for number, (put, before) in enumerate(zip(puts, befores, strict=True)):
            part = product[:, _ROW + 8 * (number >> 1), 2 * _QUAD + (number & 1)]
            put(block, where, _added(part.reshape(-1), before, result))

    return run


def fence(ins):
    return lambda block, where, index: block.flight.fence(np.unique(block.threads[where] // 128))


def wgmma(ins, columns: str, depth: str, result: str, kind: str, right_kind: str):
    """m64: a warpgroup's product, under way until it is waited for."""
    width, inner = int(columns), int(depth)
    if kind != right_kind or inner != 256 // values.bits(kind):
        raise Unsupported(f"{ins.opcode}")
    accumulators, in_registers = tuple(ins.list(0)), ins.operands[1].startswith("{")
    operands = tuple(ins.list(1)) if in_registers else ()
    if len(accumulators) != width // 2:
        raise Unsupported(f"{ins.statement}")
    descriptor, keeps = ins.number(2, "u64"), ins.number(3, "pred")
    left_descriptor = None if in_registers else ins.number(1, "u64")
    modifiers = [int(text) for text in ins.operands[4:]]
    transposed_left, transposed_right = _modifiers(modifiers, kind, in_registers)

    def run(block, where, index):
        for group in np.unique(block.threads[where] // 128):
            one = slice(128 * group, 128 * group + 128)
            key, warps = ("products", int(group)), np.arange(4 * group, 4 * group + 4)
            keep, words = _same(keeps(block, one)), _same(descriptor(block, one))
            clock, agent = block.flight.groups[key].clock, block.order.agent(key)
            release = block.flight.take(int(group), accumulators, operands)
            b_places = _matrix(block, words, width, inner, kind, transposed_right)
            block.shared.lend(warps, b_places, agent, clock, "wgmma")
            a_places = None
            if left_descriptor is not None:
                words = _same(left_descriptor(block, one))
                a_places = _matrix(block, words, 64, inner, kind, transposed_left)
                block.shared.lend(warps, a_places, agent, clock, "wgmma")
            action = _product(
                block, one, a_places, b_places, operands, accumulators, keep, kind, result
            )
            block.flight.begin(key, action, release)

    return run


def _modifiers(numbers: list[int], kind: str, in_registers: bool) -> tuple[bool, bool]:
    """Which operands are transposed."""
    if kind not in ("f16", "bf16"):
        if numbers:
            raise Unsupported(f"wgmma of .{kind} with modifiers {numbers}")
        return False, False
    if len(numbers) != (3 if in_registers else 4) or numbers[:2] != [1, 1]:
        raise Unsupported(f"wgmma with modifiers {numbers}")
    return (False if in_registers else bool(numbers[2])), bool(numbers[-1])


def _same(numbers: np.ndarray):
    if (numbers != numbers[0]).any():
        raise Fault("an operand of wgmma differs between threads")
    return int(numbers[0])


def _matrix(block, descriptor: int, rows: int, inner: int, kind: str, transposed: bool):
    """Offsets [rows, inner, bytes] of an operand in shared memory."""
    start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    if descriptor >> 62 not in _SPANS or descriptor >> 49 & 7:
        raise Unsupported(f"wgmma descriptor {descriptor:#x}")
    span, size = _SPANS[descriptor >> 62], values.bits(kind) // 8
    i, k = np.arange(rows)[:, None], np.arange(inner)[None]
    if transposed:
        each = span // size
        places = i % each * size + i // each * leading + k % 8 * span + k // 8 * stride
    else:
        places = i // 8 * stride + i % 8 * span + k * size
    addresses = swizzled(start + places, span)
    checked = block.shared.places(addresses.reshape(-1).astype(np.uint64), size, size, "wgmma")
    return checked.reshape(rows, inner, size)


def _product(block, one, a_places, b_places, operands, accumulators, keep, kind, result):
    def elements(places):
        octets = np.ascontiguousarray(block.shared.content[places])
        return values.meant(octets.view(values.storage(kind))[..., 0], kind).astype(np.float64)

    def act():
        if a_places is None:
            held = values.words([block.registers[name][one] for name in operands], kind)
            a = left(held.reshape(4, 32, *held.shape[1:])).reshape(64, -1).astype(np.float64)
        else:
            a = elements(a_places)
        product = (a @ elements(b_places).T).reshape(4, 16, -1)
        for number, name in enumerate(accumulators):
            rows = _ROW + 8 * (number >> 1 & 1)
            columns = 8 * (number // 4) + 2 * _QUAD + (number & 1)
            part = product[:, rows, columns].reshape(-1)
            before = values.meant(block.registers[name][one], result) if keep else np.int32(0)
            block.registers[name][one] = values.raw(_added(part, before, result), result)

    return act
