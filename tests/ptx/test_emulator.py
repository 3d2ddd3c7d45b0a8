"""The emulator's table and its checks, on programs of a few lines; whole kernels run in `make aot-check`."""

import numpy as np
import pytest

from tests.ptx import decode, run, schedule
from tests.ptx import program as programs
from tests.ptx.block import Launch
from tests.ptx.faults import Fault, Unsupported
from tests.ptx.memory import buffer_address

_FRAME = """
.visible .entry k(.param .u64 k_param_0)
{{
  .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<20>; .reg .b64 %rd<9>;
  .shared .align 16 .b8 smem;
  ld.param.b64 %rd1, [k_param_0];
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd2, %r1, 4;
  add.s64 %rd3, %rd1, %rd2;
  mov.b64 %rd4, smem;
  cvt.u32.u64 %r2, %rd4;
  shl.b32 %r3, %r1, 2;
  add.s32 %r4, %r2, %r3;
  {body}
  st.global.b32 [%rd3], %r9;
  ret;
}}
"""


def results(body: str, threads: int = 64, conditions=schedule.ALL) -> np.ndarray:
    """%r9 of every thread, which must not depend on the conditions; %r4 is its word of shared memory."""
    program = programs.parse(_FRAME.format(body=body))
    grid = Launch((1, 1, 1), threads, 1024, [buffer_address(0)])
    empty = [np.zeros(4 * threads, np.uint8)]
    found = [run.launch(program, grid, empty, each)[0] for each in conditions]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)
    return found[0].view(np.uint32)


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("mul.lo.s32 %r9, %r1, -3;", lambda t: -3 * t),
        ("sub.s32 %r5, %r1, 9; shr.s32 %r9, %r5, 2;", lambda t: (t - 9) >> 2),
        ("sub.s32 %r5, %r1, 9; div.s32 %r9, %r5, 4;", lambda t: np.trunc((t - 9) / 4)),
        ("sub.s32 %r5, %r1, 9; rem.s32 %r9, %r5, 4;", lambda t: np.fmod(t - 9, 4)),
        ("sub.s32 %r5, %r1, 9; bfe.s32 %r9, %r5, 0, 4;", lambda t: ((t - 9 + 8) & 15) - 8),
        ("bfe.u32 %r9, %r1, 2, 3;", lambda t: t >> 2 & 7),
        ("prmt.b32 %r9, %r1, 255, 0x4150;", lambda t: t | 255 << 24),
        ("lop3.b32 %r9, %r1, 12, 5, 0x6a;", lambda t: (t & 12) ^ 5),
        ("lop3.b32 %r9, %r1, 12, 5, 0x96;", lambda t: t ^ 12 ^ 5),
        ("shl.b32 %r9, %r1, 33;", lambda t: 0 * t),
        ("setp.lt.s32 %p1, %r1, 7; selp.b32 %r9, 3, %r1, %p1;", lambda t: np.where(t < 7, 3, t)),
        ("mov.b32 %r9, 8; @%p1 mov.b32 %r9, 2;", lambda t: 8 + 0 * t),
        ("shfl.sync.bfly.b32 %r9, %r1, 4, 31, -1;", lambda t: t ^ 4),
        ("shfl.sync.idx.b32 %r9, %r1, 3, 31, -1;", lambda t: t // 32 * 32 + 3),
        ("cvt.rn.f32.s32 %r5, %r1; mul.f32 %r6, %r5, 0f40000000; cvt.rzi.s32.f32 %r9, %r6;", lambda t: 2 * t),
        ("cvt.rn.f32.u32 %r5, %r1; cvt.rn.f16x2.f32 %r9, 0f3F800000, %r5;",
         lambda t: t.astype(np.float16).view(np.uint16).astype(int) | 0x3C00 << 16),
        ("mov.b32 %r9, 1; setp.ge.s32 %p1, %r1, 40; @%p1 bra $L; mov.b32 %r9, 2; $L:",
         lambda t: np.where(t < 40, 2, 1)),
        ("{ .reg .b32 %r9; mov.b32 %r9, 5; } mov.b32 %r9, 6;", lambda t: 6 + 0 * t),
        ("st.shared.b32 [%r4], %r1; bar.sync 0; xor.b32 %r5, %r4, 128; ld.shared.b32 %r9, [%r5];",
         lambda t: t ^ 32),
        ("cp.async.ca.shared.global [%r4], [%rd3], 4; cp.async.commit_group; cp.async.wait_group 0;"
         "ld.shared.b32 %r9, [%r4];", lambda t: 0 * t),
    ],
)  # fmt: skip
def test_instructions(body, wanted):
    threads = np.arange(64)
    np.testing.assert_array_equal(results(body), wanted(threads).astype(np.int64).astype(np.uint32))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("st.shared.b32 [%r4], %r1; xor.b32 %r5, %r4, 128; ld.shared.b32 %r9, [%r5];", "race|nothing"),
        ("ld.shared.b32 %r9, [%r4];", "nothing wrote"),
        ("ld.shared.b32 %r9, [%r4+2];", "misaligned"),
        ("ld.shared.b32 %r9, [%r4+4096];", "out of bounds"),
        ("ld.global.b32 %r9, [%rd3+4];", "out of bounds"),
        ("setp.lt.s32 %p1, %r1, 32; @%p1 bra $L; bar.sync 0; $L:", "deadlock"),
        ("$L: bra $L;", "does not end"),
        ("cp.async.ca.shared.global [%r4], [%rd3], 4; ld.shared.b32 %r9, [%r4];", "race"),
        ("cp.async.ca.shared.global [%r4], [%rd3], 4; cp.async.wait_group 0; ld.shared.b32 %r9, [%r4];", "race"),
    ],
)  # fmt: skip
def test_faults(body, reason):
    program = programs.parse(_FRAME.format(body=body))
    grid = Launch((1, 1, 1), 64, 1024, [buffer_address(0)])
    for each in schedule.ALL:
        with pytest.raises(Fault, match=reason):
            run.launch(program, grid, [np.zeros(256, np.uint8)], each, limit=200)


@pytest.mark.parametrize(
    "line",
    [
        *("add.sat.s32 %r9, %r1, %r1;", "mul.hi.f32 %r9, %r1, %r1;", "frobnicate.b32 %r9, %r1;"),
        *("ld.volatile.shared.b32 %r9, [%r4];", "wgmma.fence.sync;", "mov.b32 %r9, nobody;"),
        *("shfl.sync.idx.b32 %r9, %r1, 3, 31, 15;", "add.s32 %r9, %r1;"),
    ],
)
def test_what_has_no_entry_is_refused(line):
    with pytest.raises(Unsupported):
        decode.steps(programs.parse(_FRAME.format(body=line)))
