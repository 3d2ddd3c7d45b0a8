"""Branches, ends, and what a warp does together."""

import numpy as np

from tests.ptx import values
from tests.ptx.faults import Fault, Unsupported


def branch(ins):
    target, guard, negated = (
        ins.target(ins.operands[0]),
        ins.statement.guard,
        ins.statement.negated,
    )

    def run(block, where, index):
        block.at[where] = target
        if guard is not None:
            taken = block.registers[guard][where] != negated
            block.at[block.threads[where][~taken]] = index + 1
        return True

    return run


def indexed_branch(ins):
    number = ins.number(0, "u32")
    targets = np.array([ins.target(label) for label in ins.program.tables[ins.operands[1]]])

    def run(block, where, index):
        numbers = number(block, where)
        if int(numbers.max()) >= len(targets):
            raise Fault("brx.idx beyond its table")
        block.at[where] = targets[numbers]
        return True

    return run


def leave(ins):
    def run(block, where, index):
        threads = block.threads[where]
        if ins.statement.guard is not None:
            going = block.registers[ins.statement.guard][where] != ins.statement.negated
            block.at[threads[~going]] = index + 1
            threads = threads[going]
        block.state[threads] = 3
        return True

    return run


def nothing(ins):
    """Hints: no effect on values."""
    for place, operand in enumerate(ins.operands):
        if operand.startswith("["):
            ins.address(place)
    return lambda block, where, index: None


def elect(ins):
    lane, _, elected = ins.operands[0].partition("|")
    put_lane, put = ins.writer(lane.strip(), "u32"), ins.writer(elected.strip(), "pred")
    _full_mask(ins.operands[1])

    def run(block, where, index):
        put_lane(block, where, np.array([block.leader], np.uint32))
        put(block, where, block.threads[where] % 32 == block.leader)

    return run


def _full_mask(text: str) -> None:
    if int(values.constant(text, "u32")[0]) != 2**32 - 1:
        raise Unsupported(f"warps in part: mask {text}")


def shuffle(ins, mode: str):
    """`shfl.sync` of whole warps; `c` gives the width of the segments and the last lane of each."""
    destination, _, valid = ins.operands[0].partition("|")
    put, put_valid = ins.writer(destination, "u32"), ins.writer(valid or "_", "pred")
    value, lane, limits = (ins.number(place, "u32") for place in (1, 2, 3))
    _full_mask(ins.operands[4])

    def run(block, where, index):
        shape = (len(block.threads[where]) // 32, 32)
        source, offset, limit = (
            np.broadcast_to(read(block, where), (shape[0] * 32,)).reshape(shape)
            for read in (value, lane, limits)
        )
        mine, offset = np.arange(32), offset.astype(np.int64) & 31
        segment, clamp = (limit.astype(np.int64) >> 8) & 31, limit.astype(np.int64) & 31
        last = (mine & segment) | (clamp & ~segment)
        if mode == "idx":
            other = (offset & ~segment) | (mine & segment)
            inside = other <= last
        elif mode == "up":
            other = mine - offset
            inside = other >= last
        else:
            other = mine ^ offset if mode == "bfly" else mine + offset
            inside = other <= last
        other = np.where(inside, other, mine)
        put(block, where, np.take_along_axis(source, other, axis=1).reshape(-1))
        put_valid(block, where, np.broadcast_to(inside, shape).reshape(-1))

    return run


def set_registers(ins, direction: str):
    """`setmaxnreg`: a warpgroup gives registers back, or waits until as many are spare."""
    wanted = int(values.constant(ins.operands[0], "u32")[0])
    if wanted % 8 or not 24 <= wanted <= 256:
        raise Fault(f"setmaxnreg of {wanted} registers")

    def run(block, where, index):
        threads = block.threads[where]
        groups = np.unique(threads // 128)
        change = int((wanted - block.quota[groups]).sum())
        if (change > 0) != (direction == "inc") and change:
            raise Fault(f"setmaxnreg.{direction} from {block.quota[groups]} to {wanted}")
        if change > block.spare:
            block.wait(threads, index)
            return True
        block.spare -= change
        block.quota[groups] = wanted
        block.wake()
        return None

    return run


def move(ins, kind: str):
    """`mov`, also of halves into a register and back."""
    into, out = ins.list(0), ins.list(1)
    if len(into) == len(out) == 1:
        value, put = ins.reader(out[0], kind), ins.writer(into[0], kind)
        return lambda block, where, index: put(block, where, value(block, where))
    parts = max(len(into), len(out))
    size = values.bits(kind) // parts
    shifts = [values.storage(kind)(size * part) for part in range(parts)]
    narrow = f"b{size}"
    if len(into) == 1:
        reads, put = [ins.reader(name, narrow) for name in out], ins.writer(into[0], kind)

        def pack(block, where, index):
            wide = (
                read(block, where).astype(values.storage(kind)) << shift
                for read, shift in zip(reads, shifts, strict=True)
            )
            put(block, where, np.bitwise_or.reduce(np.broadcast_arrays(*wide)))

        return pack
    if len(out) != 1:
        raise Unsupported(f"{ins.statement}")
    value, puts = ins.reader(out[0], kind), [ins.writer(name, narrow) for name in into]

    def unpack(block, where, index):
        whole = value(block, where)
        for put, shift in zip(puts, shifts, strict=True):
            put(block, where, (whole >> shift).astype(values.storage(narrow)))

    return unpack
