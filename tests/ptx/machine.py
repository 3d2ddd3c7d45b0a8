"""Machine code: whether the assembler kept every matrix instruction of the PTX."""

import importlib.util
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from specjax.aot import resources
from tests.ptx.faults import Fault
from tests.ptx.program import Program


def instructions(cubin: bytes) -> Counter[str]:
    """Names of the instructions, counted by the disassembler of the `triton` package."""
    found = importlib.util.find_spec("triton")
    tool = Path(found.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        listing = subprocess.run([tool, "-c", file], check=True, capture_output=True, text=True)
    return Counter(name for name, _ in resources.parse(listing.stdout)[1])


def check(program: Program, cubin: bytes) -> int:
    """The number of matrix instructions, of which PTX and machine code have as many.

    Raises:
        Fault: the assembler dropped or added some.
    """
    stated = sum(each.opcode.startswith(("wgmma.mma", "mma.")) for each in program.statements)
    counted = instructions(cubin)
    made = sum(counted[name] for name in resources.MMA)
    if made != stated:
        raise Fault(f"{stated} matrix instructions in PTX, {made} in machine code")
    return stated
