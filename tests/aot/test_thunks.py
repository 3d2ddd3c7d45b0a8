"""Reading XLA's dumps: what is launched, in which command buffer, and what is moved."""

import pytest

from specjax.aot import thunks

WHOLE = """000: kCommandBuffer [source | sink]
    001: kCopy  [source       | next=002 (1)] kCopy
    002: kWhile [prev=001 (1) | sink        ]
condition:
        003: kCustomKernel [source | sink] loop_and_fusion grid: [1, 1, 1] threads: [1, 1, 1]
      body:
        004: kCustomKernel [source       | sink         ] loop_add_fusion_4_1 grid: [1, 1, 1]
        005: kCustomCall   [source       | next=006 (1) ] kCustomCall
        006: kCopy         [prev=005 (1) | next=007 (1) ] kCopy
        007: kCustomKernel [prev=006 (1) | sink         ] loop_add_fusion_2 grid: [8, 1, 1]
"""
ON_THE_HOST = """000: kCommandBuffer [source       | next=003 (1)]
    001: kCopy [source | sink] kCopy
    002: kCopy [source | sink] kCopy
003: kWhile         [prev=000 (1) | sink        ]
condition:
    004: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1] threads: [1, 1, 1]
  body:
    000: kCommandBuffer [source | sink]
        005: kCustomKernel [source       | sink        ] loop_add_fusion grid: [1, 1, 1]
        006: kCustomKernel [source       | next=007 (1)] gemm_fusion_dot grid: [8192, 1, 1]
    007: kWhile [prev=006 (1) | sink        ]
    condition:
        008: kCustomKernel [source | sink] loop_compare_fusion_1 grid: [1, 1, 1]
      body:
        009: kGemm [source | sink] kGemm
"""


def test_a_loop_in_one_graph():
    found = thunks.summary(thunks.parse(WHOLE))
    assert found["loop_in_one_graph"]
    assert found["launches_per_step"] == 5  # the condition runs in every step too
    assert found["copies_in_loop"] == 1
    assert found["captured_launches"] == 5
    assert found["not_captured"] == {}
    assert found["step"] == {"loop_add_fusion": 2, "loop_and_fusion": 1, "CustomCall": 1, "Copy": 1}
    assert found["command_buffers"] == ["6 launches, loop included"]


def test_a_loop_on_the_host():
    found = thunks.summary(thunks.parse(ON_THE_HOST))
    assert not found["loop_in_one_graph"]
    assert found["inner_loops"] == 1
    assert found["captured_launches"] == 2
    assert found["not_captured"] == {"loop_compare_fusion": 2, "Gemm": 1}
    assert found["command_buffers"] == ["2 launches", "2 launches"]


def test_sections_and_nesting():
    (top,) = thunks.parse(WHOLE)
    _, loop = top.inside
    assert [thunk.section for thunk in loop.inside] == ["condition"] + 4 * ["body"]
    assert all(thunk.captured for thunk in loop.inside)
    with pytest.raises(ValueError, match="no loop"):
        thunks.summary(thunks.parse("000: kCopy [source | sink] kCopy\n"))


def test_dumps_are_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="thunk_sequence"):
        thunks.read(tmp_path)
    (tmp_path / "module_1.jit_f.thunk_sequence.txt").write_text(ON_THE_HOST)
    (tmp_path / "module_1.jit_f.thunk_sequence_after_thunk_passes.txt").write_text(WHOLE)
    assert thunks.summary(thunks.read(tmp_path))["loop_in_one_graph"]


HLO = """
%copied (p: bf16[3,64,8]) -> bf16[64,3,8] {
  ROOT %copy.1 = bf16[64,3,8]{2,1,0} copy(%p)
}
%body (p: bf16[3,64,8]) -> bf16[3,64,8] {
  %f = bf16[64,3,8]{2,1,0} fusion(%p), kind=kLoop, calls=%copied
  %small = s32[8]{0} copy(%q)
}
ENTRY %main (p: bf16[3,64,8]) -> bf16[3,64,8] {
  %outside = bf16[3,64,8]{2,1,0} copy(%p)
  %w = bf16[3,64,8]{2,1,0} while(%outside), condition=%body, body=%body
}
"""


def test_large_moves_in_loops():
    assert thunks.large_moves(HLO, 3072) == ["ROOT %copy.1 = bf16[64,3,8]{2,1,0} copy(%p)"]
    assert not thunks.large_moves(HLO, 3073)
    assert len(thunks.large_moves(HLO, 32)) == 2
    assert not thunks.large_moves(HLO.replace("} copy(", "} negate("), 1)
