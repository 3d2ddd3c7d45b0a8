"""Loads and stores, and the asynchronous copies of threads (`cp.async`)."""

import numpy as np

from tests.ptx import values
from tests.ptx.faults import Fault, Unsupported


def load_parameter(ins, kind: str):
    name, put = ins.operands[1].strip("[] "), ins.put(0, kind)
    if name not in ins.program.parameters:
        raise Unsupported(f"parameter {name}")

    def run(block, where, index):
        argument = block.parameters[name]
        if not isinstance(argument, int):
            raise Fault(f"parameter {name} is an array of tensor maps")
        put(block, where, np.array([argument], np.uint64))

    return run


def load(ins, space: str, vector: str, kind: str):
    """From global memory (also under a generic address, as only that is converted to one) or shared memory."""
    targets, size = ins.list(0), values.bits(kind) // 8
    _check_width(ins, targets, vector)
    address, puts = ins.all_addresses(1), [ins.writer(name, kind) for name in targets]
    total = size * len(targets)

    def run(block, where, index):
        addresses = address(block, where)
        if space == "shared":
            places = block.shared.places(addresses, total, total, "load from shared memory")
            octets = block.shared.read(block.warps[where], places)
        else:
            octets = block.memory.read(addresses, total, total)
        for number, put in enumerate(puts):
            part = np.ascontiguousarray(octets[:, number * size : (number + 1) * size])
            put(block, where, values.meant(part.view(values.storage(kind))[:, 0], kind))

    return run


def store(ins, space: str, vector: str, kind: str):
    sources, size = ins.list(1), values.bits(kind) // 8
    _check_width(ins, sources, vector)
    address, reads = ins.all_addresses(0), [ins.reader(name, kind) for name in sources]
    total = size * len(sources)

    def run(block, where, index):
        addresses = address(block, where)
        columns = [
            np.broadcast_to(values.raw(read(block, where), kind), addresses.shape) for read in reads
        ]
        octets = np.ascontiguousarray(np.stack(columns, axis=1)).view(np.uint8)
        if space == "shared":
            places = block.shared.places(addresses, total, total, "store to shared memory")
            block.shared.write(block.warps[where], places, octets)
        else:
            block.memory.write(addresses, octets, total)

    return run


def _check_width(ins, registers: list[str], vector: str) -> None:
    if len(registers) != int(vector or 1):
        raise Unsupported(f"{ins.statement}: {len(registers)} registers")


def copy_async(ins, cache: str):
    """`cp.async`: bytes beyond the optional source size are zeros."""
    into, source, size = ins.all_addresses(0), ins.all_addresses(1), int(ins.operands[2], 0)
    taken = ins.number(3, "u32") if len(ins.operands) > 3 else None
    if size not in ((16,) if cache == "cg" else (4, 8, 16)):
        raise Unsupported(f"cp.async.{cache} of {size} bytes")

    def run(block, where, index):
        threads = block.threads[where]
        places = block.shared.places(into(block, where), size, size, "cp.async into shared memory")
        addresses = source(block, where)
        data = np.zeros((len(threads), size), np.uint8)
        lengths = np.full(len(threads), size)
        if taken is not None:
            lengths = np.broadcast_to(taken(block, where), threads.shape)
        for length in np.unique(lengths[lengths > 0]):
            mine = lengths == length
            data[mine, :length] = block.memory.read(addresses[mine], int(length), size)
        for warp in np.unique(threads // 32):
            mine, key = threads // 32 == warp, ("copies", int(warp))
            clock, agent = block.flight.groups[key].clock, block.order.agent(key)
            block.shared.reserve(int(warp), places[mine], agent, clock, "cp.async")
            block.flight.begin(key, _placing(block.shared, places[mine], data[mine]))

    return run


def _placing(shared, places, data):
    def place():
        shared.content[places] = data

    return place


def commit(ins, what: str, size: int = 32):
    """A warp's (warpgroup's) actions of a kind become a group."""

    def run(block, where, index):
        for number in np.unique(block.threads[where] // size):
            block.flight.groups[what, int(number)].commit()

    return run


def wait_group(ins, what: str, size: int = 32):
    """Waits until no more than so many groups are under way."""
    keep = 0 if not ins.operands else int(ins.operands[0])

    def run(block, where, index):
        for number in np.unique(block.threads[where] // size):
            warps = np.arange(number * size // 32, (number + 1) * size // 32)
            block.flight.wait((what, int(number)), keep, warps)

    return run
