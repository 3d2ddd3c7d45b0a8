"""A launch, block after block."""

import numpy as np

from tests.ptx import decode
from tests.ptx.block import Block, Launch
from tests.ptx.memory import Global
from tests.ptx.program import Program
from tests.ptx.schedule import Conditions


def launch(
    program: Program,
    grid: Launch,
    buffers: list[np.ndarray],
    conditions: Conditions,
    *,
    limit: int = 3_000_000,
    trace: dict[int, list] | None = None,
) -> list[np.ndarray]:
    """Copies of the buffers (bytes) as all blocks have left them.

    Args:
        limit: steps of a block.
        trace: gets, for every statement, what it left in its registers each time it ran.

    Raises:
        Fault: something that a GPU forbids.
        Unsupported: something that has no entry here.
    """
    memory, code = Global([buffer.copy() for buffer in buffers]), decode.steps(program)
    x, y, z = grid.grid
    with np.errstate(all="ignore"):
        for number in range(x * y * z):
            place = number % x, number // x % y, number // (x * y)
            block = Block(program, grid, place, memory, conditions)
            block.limit, block.trace = limit, trace
            block.run(code)
    return memory.buffers
