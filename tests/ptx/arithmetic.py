"""Instructions that map numbers to numbers, thread by thread."""

import inspect

import numpy as np

from tests.ptx import values
from tests.ptx.faults import Unsupported


def _arity(function, given: int) -> int:
    """Numbers that a function takes; those that count as many as they get are trusted."""
    if isinstance(function, np.ufunc):
        return function.nin
    named = inspect.signature(function).parameters.values()
    return given if any(each.kind is each.VAR_POSITIONAL for each in named) else len(named)


def elementwise(function, kind: str, sources: tuple[str, ...] = (), result: str = ""):
    """A step that applies `function` to all operands but the first, and stores its result there."""

    def build(ins):
        kinds = sources or (kind,) * (len(ins.operands) - 1)
        if len(kinds) != len(ins.operands) - 1 or len(kinds) != _arity(function, len(kinds)):
            raise Unsupported(f"{ins.opcode} with {len(ins.operands)} operands")
        numbers = [ins.number(place + 1, each) for place, each in enumerate(kinds)]
        put = ins.put(0, result or kind)

        def run(block, where, index):
            put(block, where, function(*(number(block, where) for number in numbers)))

        return run

    return build


def exact(function):
    """`function` in float64, which holds sums and products of two halves, and products of two floats, exactly."""
    return lambda *numbers: function(*(number.astype(np.float64) for number in numbers))


def fused(a, b, c):
    return a * b + c


def flushed(function):
    """Results below the smallest normal number are 0."""

    def flush(*numbers):
        result = function(*numbers)
        return np.where(np.abs(result) < np.finfo(np.float32).tiny, np.float32(0), result)

    return flush


def reciprocal_root(x):
    return 1 / np.sqrt(x.astype(np.float64))


def shift_left(a, b):
    width = 8 * a.dtype.itemsize
    return np.where(b >= width, a.dtype.type(0), a << np.minimum(b, width - 1).astype(a.dtype))


def shift_right(a, b):
    width = 8 * a.dtype.itemsize
    moved = a >> np.minimum(b, width - 1).astype(a.dtype)
    return moved if a.dtype.kind == "i" else np.where(b >= width, a.dtype.type(0), moved)


def wide_product(kind: str):
    """`mul.wide`: twice the width."""
    double = kind[0] + str(2 * values.bits(kind))
    dtype = values.meant(np.zeros(1, values.storage(double)), double).dtype
    return lambda a, b: a.astype(dtype) * b.astype(dtype)


def high_product(a, b):
    width = 8 * a.dtype.itemsize
    double = (np.int64 if a.dtype.kind == "i" else np.uint64) if width < 64 else object
    return ((a.astype(double) * b.astype(double)) >> width).astype(a.dtype)


def divide(a, b):
    """Rounds towards zero."""
    if (b == 0).any():
        raise Unsupported("division by zero")
    if a.dtype.kind == "u":
        return a // b
    return (np.sign(a) * np.sign(b)).astype(a.dtype) * (abs(a) // abs(b))


def remainder(a, b):
    return a - divide(a, b) * b


def extract(a, position, length):
    """`bfe`."""
    width = 8 * a.dtype.itemsize
    unsigned = a.view(a.dtype.str.replace("i", "u"))
    position, length = (
        np.minimum(x & 255, width).astype(unsigned.dtype) for x in (position, length)
    )
    mask = shift_left(np.ones_like(length), length) - unsigned.dtype.type(1)
    field = shift_right(unsigned, position) & mask
    if a.dtype.kind == "u":
        return field
    last = np.minimum(position + length - 1, width - 1)
    sign = shift_right(unsigned, last) & unsigned.dtype.type(1)
    return np.where(sign.astype(bool), field | ~mask, field).view(a.dtype)


def insert(a, b, position, length):
    """`bfi`: the low bits of a into b."""
    mask = shift_left(shift_left(np.ones_like(a), length) - a.dtype.type(1), position)
    return (shift_left(a, position) & mask) | (b & ~mask)


def permute(a, b, selector):
    """`prmt`: four bytes of eight; the top bit of a selector copies the sign."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    pool = np.ascontiguousarray(np.stack([a, b], axis=1)).view(np.uint8)
    chosen = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & 15
    octets = np.take_along_axis(pool, (chosen & 7).astype(np.int64), axis=1)
    signs = np.where(octets & 128, 255, 0).astype(np.uint8)
    picked = np.where(chosen & 8, signs, octets)
    return np.ascontiguousarray(picked).view(np.uint32).reshape(-1)


def logic(a, b, c, table):
    """`lop3`, bit by bit: the entry of `table` at 4 a + 2 b + c."""
    table = int(table[0])
    if table == 0x6A:
        return (a & b) ^ c
    if table == 0xEA:
        return (a & b) | c
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
    for entry in range(8):
        if table >> entry & 1:
            terms = [x if entry >> bit & 1 else ~x for x, bit in ((a, 2), (b, 1), (c, 0))]
            out |= terms[0] & terms[1] & terms[2]
    return out


def choose(a, b, which):
    return np.where(which, a, b)


COMPARISONS = {
    "eq": np.equal,
    "ne": lambda a, b: (a != b) & (a == a) & (b == b),
    "neu": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def rounded(target: str, mode: str):
    """Conversion of numbers to `target`; the default rounds floats to even, as numpy does."""
    integer = target[0] in "us" and not target.endswith("x2")
    if not integer:
        return lambda x: x if x.dtype.kind in "iu" else x.astype(np.float64)
    dtype = values.meant(np.zeros(1, values.storage(target)), target).dtype
    step = {"": None, "rzi": np.trunc, "rni": np.rint}[mode]

    def convert(x):
        if x.dtype.kind in "iu":
            return x.astype(dtype)
        if step is None:
            raise Unsupported(f"cvt to {target} without a rounding mode")
        info = np.iinfo(dtype)
        x = np.nan_to_num(step(x.astype(np.float64)), nan=0.0)
        return np.clip(x, info.min, info.max).astype(dtype)

    return convert


def pair(high, low):
    """`cvt` of two numbers to a pair: the first operand is the upper half."""
    return np.stack(np.broadcast_arrays(low, high), axis=1)
