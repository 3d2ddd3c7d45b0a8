"""Reading the reports of assemblers and disassemblers."""

import pytest

from specjax.aot import kernels, report, resources, topology

SASS = """
.L_x_0:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDS R2, [R3] ;
        /*0020*/              @!P0 LOP3.LUT R4, R2, 0xf000f, RZ, 0xc0, !PT ;
        /*0030*/                   HADD2 R4, R4, -1032 ;
        /*0040*/                   HGMMA.64x8x16.F32 R24, R4, gdesc[UR8] ;
        /*0050*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   STG.E [R2], R24 ;
        /*0080*/               @P2 BRA `(.L_x_0) ;
        /*0090*/                   EXIT ;
"""
PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'k' for 'sm_90a'
    16 bytes stack frame, {spill} bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""


def kernel(tmp_path, spill=0, shared=182272):
    (tmp_path / "k_0.ptxas").write_text(PTXAS.format(spill=spill))
    (tmp_path / "k_0.resources.txt").write_text(f"Resources(smem_scratch_bytes={shared}, tmem=0)")
    (tmp_path / "k_0.ptx").write_text(".version 9.0")


def test_the_main_loop_is_the_shortest_around_a_matrix_instruction():
    loop = resources.main_loop(SASS)
    assert loop == {"LDS": 1, "LOP3": 1, "HADD2": 1, "HGMMA": 1, "UIADD3": 1, "BRA": 1}
    assert not resources.main_loop(SASS.replace("HGMMA", "FFMA"))


def test_instructions_per_weight():
    taken = resources.Resources(
        kernel="k",
        registers=168,
        spill_bytes=0,
        stack_bytes=0,
        shared_memory=0,
        loop=dict(resources.main_loop(SASS)),
    )
    share = taken.per_weight(weights=4, threads=2)
    # Instructions of the uniform pipe are issued apart.
    assert share == {"all": 2.5, "alu": 0.5, "fma": 0.5, "memory": 0.5, "matrix": 0.5}


def test_reports_are_read_and_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "disassemble", lambda ptx, sm: (SASS, ""))
    target = topology.lookup("h200")
    kernel(tmp_path)
    taken = resources.read(tmp_path / "k_0", target.sm)
    assert (taken.registers, taken.stack_bytes, taken.shared_memory) == (168, 16, 182272)
    assert taken.matrix_instructions == {"HGMMA": 1}
    assert kernels.problems(taken, target) == ["8 bytes of registers spilled"]
    kernel(tmp_path, spill=4, shared=300000)
    taken = resources.read(tmp_path / "k_0", target.sm)
    assert len(kernels.problems(taken, target)) == 2
    (other,) = kernels.problems(taken, topology.lookup("a100"))[2:]
    assert "no matrix instruction" in other
    assert len(kernels.problems(taken, topology.lookup("a100"), matrix=False)) == 2


def test_resources_of_a_triton_kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "disassemble", lambda ptx, sm: (SASS, PTXAS.format(spill=4)))
    (tmp_path / "k.compile_info").write_text("k: shared_mem_bytes: 8192\n")
    taken = resources.read_triton(tmp_path / "k", "sm_90a")
    assert (taken.registers, taken.spill_bytes, taken.shared_memory) == (168, 12, 8192)
    assert taken.matrix_instructions == {"HGMMA": 1}


def test_a_report_without_registers_is_refused(tmp_path):
    kernel(tmp_path)
    (tmp_path / "k_0.ptxas").write_text("nothing")
    with pytest.raises(ValueError, match="registers"):
        resources.read(tmp_path / "k_0", "sm_90a")


def test_tables(tmp_path):
    row = dict(target="T", op="o", case="c", registers=168, spill_bytes=0, shared_memory=10)
    row |= dict(shared_memory_limit=20, matrix={"HGMMA": 2}, problems=[])
    row |= dict(per_weight={"all": 1.62, "alu": 0.7})
    failed = dict(target="T", op="o", case="d", error="does | not compile")
    text = report.kernel_table([row, failed])
    assert "| T | o | c | 168 | 0 | 10 of 20 | 2 HGMMA | 1.62 / 0.70 | none |" in text
    assert "does / not compile" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_a_summary_has_a_line_per_weight():
    def row(case, share, **more):
        base = dict(target="T", op="o", case=case, registers=100, spill_bytes=0, problems=[])
        share = share and {"all": share}
        return base | dict(shared_memory=10, matrix={"HGMMA": 2}, per_weight=share) | more

    rows = [row("m/o/1 rows/f16", 1.5), row("m/o/64 rows/f16", 2.25, registers=168)]
    rows.append(row("m/o/g64/64 rows/f16", None, problems=["spills"]))
    rows.append(dict(target="T", op="o", case="m/qkv/1 rows/f16", error="does not compile"))
    text = report.kernel_summary(rows)
    assert "per weight, M=1 | per weight, M=64 |" in text.splitlines()[0]
    assert "| T | o | m/o/f16 | 168 | 0 | 10 | HGMMA | 0 | 1.50 | 2.25 |" in text
    assert "| T | o | m/o/g64/f16 | 100 | 0 | 10 | HGMMA | 1 | - | - |" in text
    assert "| T | o | m/qkv/f16 | - | - | - |  | 1 | - | - |" in text
