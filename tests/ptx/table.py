"""The table of instructions: what an opcode with all its modifiers means. What has no entry is an error.

An entry is a pattern of the whole opcode; what its groups match is passed on to the builder, which makes a step
(block, threads, index) of an instruction.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.ptx import arithmetic as number
from tests.ptx import barriers, control, matrices, tensors, transfers, values
from tests.ptx.faults import Unsupported


@dataclass(frozen=True)
class Entry:
    """Attributes:
    build: (instruction, *groups of the pattern) -> step.
    unit: threads that execute it together.
    guarded: it looks at its predicate itself.
    """

    build: Callable
    unit: int = 1
    guarded: bool = False


def _same(function) -> Callable:
    """Operands and result are of the type in the pattern."""
    return lambda ins, kind: number.elementwise(function, kind)(ins)


def _bits(function) -> Callable:
    def build(ins, kind: str):
        logical = {np.bitwise_not: np.logical_not}.get(function, function)
        return number.elementwise(logical if kind == "pred" else function, kind)(ins)

    return build


def _shift(function) -> Callable:
    return lambda ins, kind: number.elementwise(function, kind, (kind, "u32"))(ins)


def _floats(function) -> Callable:
    """Rounded once, from float64; with ftz small results are 0."""

    def build(ins, ftz: str, kind: str):
        whole = number.exact(function)
        return number.elementwise(number.flushed(whole) if ftz else whole, kind)(ins)

    return build


def _wide(ins, kind: str):
    double = kind[0] + str(2 * values.bits(kind))
    return number.elementwise(number.wide_product(kind), kind, (kind, kind), double)(ins)


def _wide_sum(ins, kind: str):
    double = kind[0] + str(2 * values.bits(kind))
    product = number.wide_product(kind)
    build = number.elementwise(
        lambda a, b, c: product(a, b) + c, kind, (kind, kind, double), double
    )
    return build(ins)


def _compare(ins, comparison: str, kind: str):
    function = number.COMPARISONS[comparison]
    return number.elementwise(function, kind, (kind, kind), "pred")(ins)


def _choose(ins, kind: str):
    return number.elementwise(number.choose, kind, (kind, kind, "pred"))(ins)


def _convert(ins, mode: str, target: str, source: str):
    return number.elementwise(number.rounded(target, mode), source, (source,), target)(ins)


def _pair(ins, target: str, source: str):
    return number.elementwise(number.pair, source, (source, source), target)(ins)


def _extract(ins, kind: str):
    return number.elementwise(number.extract, kind, (kind, "u32", "u32"))(ins)


def _insert(ins, kind: str):
    return number.elementwise(number.insert, kind, (kind, kind, "u32", "u32"))(ins)


def _fixed(builder: Callable, *arguments) -> Callable:
    return lambda ins, *groups: builder(ins, *arguments, *groups)


_INT = r"([usb](?:16|32|64))"
_SIGNED = r"([us](?:16|32|64))"
_FLOAT = r"(f32|f16|bf16|f16x2|bf16x2)"

TABLE: dict[str, Entry] = {
    # Integers
    rf"add\.{_SIGNED}": Entry(_same(np.add)),
    rf"sub\.{_SIGNED}": Entry(_same(np.subtract)),
    rf"mul\.lo\.{_SIGNED}": Entry(_same(np.multiply)),
    rf"mad\.lo\.{_SIGNED}": Entry(_same(number.fused)),
    rf"mul\.hi\.{_SIGNED}": Entry(_same(number.high_product)),
    r"mul\.wide\.([us](?:16|32))": Entry(_wide),
    r"mad\.wide\.([us](?:16|32))": Entry(_wide_sum),
    rf"div\.{_SIGNED}": Entry(_same(number.divide)),
    rf"rem\.{_SIGNED}": Entry(_same(number.remainder)),
    rf"min\.{_SIGNED}": Entry(_same(np.minimum)),
    rf"max\.{_SIGNED}": Entry(_same(np.maximum)),
    r"neg\.(s(?:16|32|64))": Entry(_same(np.negative)),
    r"abs\.(s(?:16|32|64))": Entry(_same(np.abs)),
    # Bits
    r"and\.(pred|b16|b32|b64)": Entry(_bits(np.bitwise_and)),
    r"or\.(pred|b16|b32|b64)": Entry(_bits(np.bitwise_or)),
    r"xor\.(pred|b16|b32|b64)": Entry(_bits(np.bitwise_xor)),
    r"not\.(pred|b16|b32|b64)": Entry(_bits(np.bitwise_not)),
    r"shl\.(b16|b32|b64)": Entry(_shift(number.shift_left)),
    rf"shr\.{_INT}": Entry(_shift(number.shift_right)),
    r"bfe\.([us](?:32|64))": Entry(_extract),
    r"bfi\.(b32|b64)": Entry(_insert),
    r"prmt\.(b32)": Entry(_same(number.permute)),
    r"lop3\.(b32)": Entry(_same(number.logic)),
    # Floats
    rf"add(?:\.rn)?(\.ftz)?\.{_FLOAT}": Entry(_floats(np.add)),
    rf"sub(?:\.rn)?(\.ftz)?\.{_FLOAT}": Entry(_floats(np.subtract)),
    rf"mul(?:\.rn)?(\.ftz)?\.{_FLOAT}": Entry(_floats(np.multiply)),
    rf"fma\.rn(\.ftz)?\.{_FLOAT}": Entry(_floats(number.fused)),
    r"div(?:\.rn|\.full|\.approx)(\.ftz)?\.(f32)": Entry(_floats(np.divide)),
    rf"neg(\.ftz)?\.{_FLOAT}": Entry(_floats(np.negative)),
    rf"abs(\.ftz)?\.{_FLOAT}": Entry(_floats(np.abs)),
    rf"max(\.ftz)?\.NaN\.{_FLOAT}": Entry(_floats(np.maximum)),
    rf"min(\.ftz)?\.NaN\.{_FLOAT}": Entry(_floats(np.minimum)),
    rf"max(\.ftz)?\.{_FLOAT}": Entry(_floats(np.fmax)),
    rf"min(\.ftz)?\.{_FLOAT}": Entry(_floats(np.fmin)),
    r"ex2\.approx(\.ftz)?\.(f32)": Entry(_floats(np.exp2)),
    r"rsqrt\.approx(\.ftz)?\.(f32)": Entry(_floats(number.reciprocal_root)),
    r"sqrt\.(?:approx|rn)(\.ftz)?\.(f32)": Entry(_floats(np.sqrt)),
    r"rcp\.(?:approx|rn)(\.ftz)?\.(f32)": Entry(_floats(np.reciprocal)),
    # Choices and conversions
    r"setp\.(\w+)\.([usb](?:16|32|64)|f32|f16|bf16)": Entry(_compare),
    r"selp\.([usb](?:16|32|64)|f32)": Entry(_choose),
    r"cvt(?:\.rn)?\.(f16x2|bf16x2)\.(f32)": Entry(_pair),
    r"cvt(?:\.rn|\.(rzi|rni))?\.([usf](?:8|16|32|64)|bf16)\.([usf](?:8|16|32|64)|bf16)": Entry(
        lambda ins, mode, target, source: _convert(ins, mode or "", target, source)
    ),
    # Moves
    r"mov\.(pred|[busf](?:16|32|64))": Entry(control.move),
    r"cvta(?:\.to)?\.(?:global|shared|param)\.(u64)": Entry(control.move),
    r"ld\.param(?:::entry)?\.([bu]64)": Entry(transfers.load_parameter),
    r"ld(?:\.(global|shared))?(?:\.v([248]))?\.([busf](?:8|16|32|64))": Entry(transfers.load),
    r"st(?:\.(global|shared))?(?:\.v([248]))?\.([busf](?:8|16|32|64))": Entry(transfers.store),
    r"cp\.async\.(cg|ca)\.shared\.global": Entry(transfers.copy_async),
    r"cp\.async\.commit_group": Entry(_fixed(transfers.commit, "copies"), 32),
    r"cp\.async\.wait_group": Entry(_fixed(transfers.wait_group, "copies"), 32),
    r"prefetch\.tensormap": Entry(control.nothing),
    # Boxes of arrays
    r"cp\.async\.bulk\.tensor\.([1-5])d\.shared::cluster\.global\.mbarrier::complete_tx::bytes": Entry(
        tensors.copy_in
    ),
    r"cp\.async\.bulk\.tensor\.([1-5])d\.global\.shared::cta\.bulk_group": Entry(tensors.copy_out),
    r"cp\.async\.bulk\.commit_group": Entry(_fixed(transfers.commit, "stores"), 32),
    r"cp\.async\.bulk\.wait_group\.read": Entry(_fixed(transfers.wait_group, "stores"), 32),
    # Control
    r"bra(?:\.uni)?": Entry(control.branch, guarded=True),
    r"brx\.idx": Entry(control.indexed_branch),
    r"nop": Entry(control.nothing),
    r"ret": Entry(control.leave, guarded=True),
    r"elect\.sync": Entry(control.elect, 32),
    r"shfl\.sync\.(idx|bfly|up|down)\.b32": Entry(control.shuffle, 32),
    r"setmaxnreg\.(inc|dec)\.sync\.aligned\.u32": Entry(control.set_registers, 128),
    # Barriers and fences
    r"bar\.sync": Entry(barriers.bar_sync, 32),
    r"bar\.warp\.sync": Entry(barriers.bar_warp_sync, 32),
    r"fence\.proxy\.async\.shared::cta": Entry(barriers.fence_proxy),
    r"fence\.mbarrier_init\.release\.cluster": Entry(barriers.fence_mbarrier_init),
    r"mbarrier\.init(?:\.shared|\.shared::cta)\.b64": Entry(barriers.mbarrier_init),
    r"mbarrier\.arrive(?:\.release\.cta)?(?:\.shared|\.shared::cta)\.b64": Entry(
        barriers.mbarrier_arrive
    ),
    r"mbarrier\.arrive\.(noComplete|expect_tx)(?:\.shared|\.shared::cta)\.b64": Entry(
        barriers.mbarrier_arrive
    ),
    r"mbarrier\.try_wait\.parity(?:\.shared|\.shared::cta)\.b64": Entry(barriers.mbarrier_try_wait),
    # Matrices
    r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16": Entry(
        matrices.load_matrices, 32
    ),
    r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.(f32|s32)\.(f16|bf16|s8|s4)\.\3\.\2": Entry(
        matrices.mma, 32
    ),
    r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.(f32|s32)\.(f16|bf16|s8)\.(f16|bf16|s8)": Entry(
        matrices.wgmma, 128
    ),
    r"wgmma\.fence\.sync\.aligned": Entry(matrices.fence, 128),
    r"wgmma\.commit_group\.sync\.aligned": Entry(_fixed(transfers.commit, "products", 128), 128),
    r"wgmma\.wait_group\.sync\.aligned": Entry(_fixed(transfers.wait_group, "products", 128), 128),
}
_PATTERNS = [(re.compile(pattern), entry) for pattern, entry in TABLE.items()]


@functools.cache
def lookup(opcode: str) -> tuple[Entry, re.Match]:
    """The entry of an opcode.

    Raises:
        Unsupported: it has none.
    """
    for pattern, entry in _PATTERNS:
        match = pattern.fullmatch(opcode)
        if match:
            return entry, match
    raise Unsupported(f"instruction {opcode} has no entry in tests/ptx/table.py")
