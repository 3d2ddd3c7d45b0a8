"""Statements -> steps: operands become readers and writers of registers, opcodes are looked up in the table."""

import re
from collections.abc import Callable

import numpy as np

from tests.ptx import values
from tests.ptx.block import Step
from tests.ptx.faults import Unsupported
from tests.ptx.memory import SHARED_BASE
from tests.ptx.program import Program, Statement, split

# Address of a parameter that is an array of tensor maps: its number, and the offset in bytes.
PARAMETER_BASE, PARAMETER_BITS = 1 << 60, 20
_SPECIAL = {
    "%tid.x": lambda block, where: block.threads[where],
    "%laneid": lambda block, where: block.threads[where] % 32,
    "%ctaid.x": lambda block, where: np.array([block.place[0]]),
    "%ctaid.y": lambda block, where: np.array([block.place[1]]),
    "%ctaid.z": lambda block, where: np.array([block.place[2]]),
    "%nctaid.x": lambda block, where: np.array([block.launch.grid[0]]),
    "%nctaid.y": lambda block, where: np.array([block.launch.grid[1]]),
    "%nctaid.z": lambda block, where: np.array([block.launch.grid[2]]),
}
_ADDRESS = re.compile(r"\[\s*([%$\w@.]+)\s*(?:\+\s*(-?\d+)\s*|(-\d+)\s*)?\]")


class Instruction:
    """A statement for those who build its step: its operands by number."""

    def __init__(self, program: Program, statement: Statement):
        self.program, self.statement = program, statement
        self.opcode, self.operands = statement.opcode, statement.operands

    def target(self, label: str) -> int:
        return self.program.target(label, self.statement.scopes)

    def list(self, place: int) -> list[str]:
        """The registers of a vector operand `{a, b}`, or the one of a scalar."""
        text = self.operands[place]
        return split(text[1:-1]) if text.startswith("{") else [text]

    def reader(self, text: str, kind: str) -> Callable:
        """(block, where) -> numbers of type `kind`: [n], or [1] where all threads have the same."""
        raw = self._raw(text, kind)
        return lambda block, where: values.meant(raw(block, where), kind)

    def _raw(self, text: str, kind: str) -> Callable:
        if text in self.program.registers:
            return lambda block, where: block.registers[text][where]
        if text in _SPECIAL:
            special, dtype = _SPECIAL[text], values.storage(kind)
            return lambda block, where: special(block, where).astype(dtype)
        if text in self.program.shared:
            literal = str(SHARED_BASE + self.program.shared[text][0])
        elif text in self.program.parameters:
            number = self.program.parameters.index(text)
            literal = str(PARAMETER_BASE + (number << PARAMETER_BITS))
        else:
            literal = text
        fixed = values.constant(literal, kind)
        return lambda block, where: fixed

    def number(self, place: int, kind: str) -> Callable:
        return self.reader(self.operands[place], kind)

    def writer(self, text: str, kind: str) -> Callable:
        """(block, where, numbers): rounds to `kind` and stores; wider registers are extended as the type says."""
        if text == "_":
            return lambda block, where, numbers: None
        if text not in self.program.registers:
            raise Unsupported(f"{text} is no register")
        held = self.program.registers[text]
        if values.storage(held) == values.storage(kind):

            def put(block, where, numbers):
                block.registers[text][where] = values.raw(numbers, kind)

            return put
        extended = ("s" if kind[0] == "s" else "u") + str(values.bits(held))

        def put_wider(block, where, numbers):
            narrow = values.meant(values.raw(numbers, kind), kind)
            block.registers[text][where] = values.raw(narrow, extended)

        return put_wider

    def put(self, place: int, kind: str) -> Callable:
        return self.writer(self.operands[place], kind)

    def address(self, place: int) -> Callable:
        """(block, where) -> addresses, uint64."""
        found = _ADDRESS.fullmatch(self.operands[place])
        if found is None:
            raise Unsupported(f"address {self.operands[place]}")
        base = self.reader(found[1], "u64")
        offset = np.uint64(int(found[2] or found[3] or 0) & (2**64 - 1))
        return lambda block, where: base(block, where) + offset

    def all_addresses(self, place: int) -> Callable:
        """As `address`, one for each thread."""
        address = self.address(place)
        return lambda block, where: np.broadcast_to(
            address(block, where), block.threads[where].shape
        )


def steps(program: Program) -> list[Step]:
    """The program, ready to run.

    Raises:
        Unsupported: an opcode, modifier or operand without an entry in the table.
    """
    shared = _product_registers(program)
    return [_step(program, statement, shared) for statement in program.statements]


def _step(program: Program, statement: Statement, products: frozenset[str]) -> Step:
    from tests.ptx import table

    instruction = Instruction(program, statement)
    entry, match = table.lookup(statement.opcode)
    run = entry.build(instruction, *match.groups())
    if products and not statement.opcode.startswith("wgmma"):
        run = _watched(run, *_uses(program, statement, products))
    if statement.guard and not entry.guarded:
        if entry.unit > 1:
            raise Unsupported(f"a predicate on {statement.opcode}")
        run = _guarded(run, statement)
    named = re.findall(r"[%\w$@]+", f"{statement.guard} " + " ".join(statement.operands))
    registers = tuple(name for name in named if name in program.registers)
    guard = None if entry.guarded else statement.guard
    return Step(run, entry.unit, str(statement), registers, guard, statement.negated)


def _guarded(run: Callable, statement: Statement) -> Callable:
    guard, negated = statement.guard, statement.negated

    def guarded(block, where, index):
        chosen = block.registers[guard][where] != negated
        if chosen.all():
            return run(block, where, index)
        threads = block.threads[where][chosen]
        if len(threads) and run(block, threads, index):
            raise Unsupported(f"a predicate on {statement.opcode}")
        return None

    return guarded


def _product_registers(program: Program) -> frozenset[str]:
    """Accumulators and register operands of all wgmma."""
    found: set[str] = set()
    for statement in program.statements:
        if statement.opcode.startswith("wgmma.mma_async"):
            for operand in statement.operands[:2]:
                if operand.startswith("{"):
                    found.update(split(operand[1:-1]))
    return frozenset(found)


def _uses(program: Program, statement: Statement, products: frozenset[str]):
    """The registers of `products` that a statement reads and writes."""
    names = [re.findall(r"[%\w$@.]+", operand) for operand in statement.operands]
    first = 0 if statement.opcode.startswith(("st.", "cp.", "bar.", "bra")) else 1
    writes = {name for part in names[:first] for name in part}
    reads = {name for part in names[first:] for name in part}
    return tuple(reads & products), tuple(writes & products)


def _watched(run: Callable, reads: tuple[str, ...], writes: tuple[str, ...]) -> Callable:
    if not reads and not writes:
        return run

    def watched(block, where, index):
        block.flight.touch(block.threads[where], reads, writes)
        return run(block, where, index)

    return watched
