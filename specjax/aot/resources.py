"""What a compiled kernel takes: registers, spills, shared memory, and the instructions of its main loop.

Registers and spills are from the report of the assembler that made the kernel (ptxas inside JAX's plugin). Instructions
are counted in SASS: the same PTX assembled once more by the ptxas of the `triton` package and disassembled by its
nvdisasm, so a count may differ by a few from the kernel that runs.
"""

import importlib.util
import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

MMA = ("HGMMA", "IGMMA", "HMMA", "IMMA")
# Integer and logic instructions share one pipe, whose rate is half the issue rate.
_ALU = frozenset(
    (
        *("LOP3", "PRMT", "SHF", "SEL", "FSEL", "ISETP", "IADD3", "VIADD", "FMNMX", "VIMNMX"),
        *("IMNMX", "LEA", "PLOP3", "SGXT", "FSETP", "I2FP"),
    )
)
_FMA = frozenset(("FFMA", "FMUL", "FADD", "IMAD", "HFMA2", "HADD2", "HMUL2"))
_MEMORY = frozenset(
    ("LDS", "LDSM", "STS", "LDG", "STG", "LDGSTS", "UTMALDG", "UTMASTG", "LD", "ST")
)
_LABEL = re.compile(r"\s*(\.L_x?_?\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(.*)")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one kernel takes.

    Attributes:
        kernel: its name.
        registers: per thread.
        spill_bytes: stores and loads of registers that did not fit, per thread.
        stack_bytes: stack frame per thread.
        shared_memory: bytes per block.
        instructions: of the whole kernel in SASS, by name; empty where there is no disassembler.
        loop: of the shortest loop around a matrix instruction; empty where there is none.
    """

    kernel: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_memory: int
    instructions: dict[str, int] = field(default_factory=dict)
    loop: dict[str, int] = field(default_factory=dict)

    @property
    def matrix_instructions(self) -> dict[str, int]:
        return {name: self.instructions[name] for name in MMA if name in self.instructions}

    def per_weight(self, weights: int, threads: int) -> dict[str, float]:
        """Instructions of the main loop per weight, by pipe, where `threads` multiply `weights` in a pass."""
        share = threads / weights
        issued = {k: n for k, n in self.loop.items() if not k.startswith("U") and k != "NOP"}

        def total(names) -> float:
            return round(sum(n for name, n in issued.items() if name in names) * share, 3)

        return {
            "all": round(sum(issued.values()) * share, 3),
            "alu": total(_ALU),
            "fma": total(_FMA),
            "memory": total(_MEMORY),
            "matrix": total(MMA),
        }


def read(stem: Path, sm: str) -> Resources:
    """Resources of a kernel from the files `stem`.ptx, .ptxas and .resources.txt that Mosaic GPU wrote."""
    report = stem.with_name(stem.name + ".ptxas").read_text()
    declared = stem.with_name(stem.name + ".resources.txt").read_text()
    listing, _ = disassemble(stem.with_name(stem.name + ".ptx"), sm)
    return _resources(
        stem.name,
        report,
        _number(r"smem_scratch_bytes=(\d+)", declared),
        listing,
        main_loop(listing),
    )


def read_triton(stem: Path, sm: str) -> Resources:
    """Resources of a kernel from the files `stem`.ptx and .compile_info that jax-triton wrote.

    The assembler is the `triton` package's throughout. Its unrolled loops are not counted per weight.
    """
    listing, report = disassemble(stem.with_name(stem.name + ".ptx"), sm)
    declared = stem.with_name(stem.name + ".compile_info").read_text()
    return _resources(stem.name, report, _number(r"shared_mem_bytes: (\d+)", declared), listing, {})


def _resources(kernel: str, report: str, shared_memory: int, listing: str, loop) -> Resources:
    spilled = (_number(rf"(\d+) bytes spill {kind}", report) for kind in ("stores", "loads"))
    return Resources(
        kernel=kernel,
        registers=_number(r"Used (\d+) registers", report),
        spill_bytes=sum(spilled),
        stack_bytes=_number(r"(\d+) bytes stack frame", report),
        shared_memory=shared_memory,
        instructions=dict(Counter(name for name, _ in parse(listing)[1])),
        loop=dict(loop),
    )


def _number(pattern: str, text: str) -> int:
    found = [int(value) for value in re.findall(pattern, text)]
    if not found:
        raise ValueError(f"no match of {pattern!r} in the report of a kernel:\n{text[:500]}")
    return max(found)


def disassemble(ptx: Path, sm: str) -> tuple[str, str]:
    """SASS of a PTX file and the assembler's report; both empty without the `triton` package, which has the tools."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        return "", ""
    tools = Path(found.origin).parent / "backends" / "nvidia" / "bin"
    cubin = ptx.with_suffix(".cubin")
    assemble = [tools / "ptxas-blackwell", f"-arch={sm}", "-O3", "-v", ptx, "-o", cubin]
    report = subprocess.run(assemble, check=True, capture_output=True, text=True).stderr
    listing = subprocess.run(
        [tools / "nvdisasm", "-c", cubin], check=True, capture_output=True, text=True
    ).stdout
    cubin.unlink()
    ptx.with_suffix(".sass").write_text(listing)
    return listing, report


def parse(listing: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Labels (name -> index of the next instruction) and instructions (name, operands) of a SASS listing."""
    labels, instructions = {}, []
    for line in listing.splitlines():
        label = _LABEL.match(line)
        if label:
            labels[label[1]] = len(instructions)
            continue
        instruction = _INSTRUCTION.search(line)
        if instruction:
            instructions.append((instruction[1], instruction[2]))
    return labels, instructions


def main_loop(listing: str, matrix: Sequence[str] = MMA) -> Counter[str]:
    """Instructions of the shortest backward branch that spans a matrix instruction."""
    labels, instructions = parse(listing)
    best: list[tuple[str, str]] = []
    for index, (name, operands) in enumerate(instructions):
        if name != "BRA":
            continue
        for label in re.findall(r"\.L_\w+", operands):
            begin = labels.get(label, index + 1)
            body = instructions[begin : index + 1]
            spans = any(name in matrix for name, _ in body)
            if spans and (not best or len(body) < len(best)):
                best = body
    return Counter(name for name, _ in best)
