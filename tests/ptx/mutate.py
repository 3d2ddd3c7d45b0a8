"""The emulator's own test: a program with one fault must not pass.

Faults are drawn by seed from all places where one can be: every wait, fence and barrier of the program left out, every
literal and every coordinate of a copy changed. What neither faults nor changes a byte of the results has to fall under
one of `RULES`.
"""

import dataclasses
import re
from collections import Counter

import numpy as np

from tests.ptx import run, schedule
from tests.ptx.faults import Fault, Unsupported
from tests.ptx.kernel import Emulated
from tests.ptx.program import Program, Statement, parse

RULES = {
    "not executed": "no thread of the launch comes to the statement",
    "hint": "time to wait, or a prefetch: a GPU may ignore it",
    "registers": "how many registers the assembler gives to which warpgroup is not part of the emulation",
    "ordered anyway": "without it vector clocks find no unordered accesses, and fences cover all asynchronous reads",
    "same values": "the statement writes the same values as before, whenever it runs",
    "absorbed": "other values in registers, but all stores, copies and branches are the same",
    "same stores": "other branches, but the same statements store and copy the same to the same places",
}
_ORDERING = re.compile(
    r"bar\.|fence\.|wgmma\.(fence|commit|wait)|cp\.async\.(bulk\.)?(commit|wait)|mbarrier\.(arrive|try_wait|init)|"
    r"setmaxnreg"
)
_LITERAL = re.compile(r"(?<![\w%$.@])(-?\d+|0x[0-9A-Fa-f]+|0f[0-9A-Fa-f]{8})(?!\w)")
_STORES, _BRANCHES = ("st.", "cp."), ("bra", "brx")


@dataclasses.dataclass(frozen=True)
class Mutation:
    """Attributes:
    index: of the statement.
    statement: in its place; None: it is left out.
    """

    index: int
    statement: Statement | None
    text: str


def sites(program: Program) -> list[tuple[str, int, int, re.Match | None]]:
    """Kind, statement, operand and match of every place that can be changed."""
    found = []
    for index, statement in enumerate(program.statements):
        if _ORDERING.match(statement.opcode):
            found.append(("order", index, 0, None))
        for place, operand in enumerate(statement.operands):
            box = statement.opcode.startswith("cp.async.bulk.tensor") and "{" in operand
            inside = operand.index("{") if box else 0
            for match in re.compile(r"[%\w]+").finditer(operand, inside) if box else ():
                found.append(("coordinate", index, place, match))
            for match in _LITERAL.finditer(operand):
                found.append(("constant", index, place, match))
    return found


def draw(program: Program, count: int, seed: int) -> list[tuple[str, Mutation]]:
    """`count` mutations of each kind, or all there are."""
    rng, chosen = np.random.default_rng(seed), []
    for kind in ("order", "coordinate", "constant"):
        mine = [site for site in sites(program) if site[0] == kind]
        for number in rng.permutation(len(mine))[:count]:
            _, index, place, match = mine[number]
            chosen.append((kind, _mutation(program, index, place, match, rng)))
    return chosen


def _mutation(program: Program, index: int, place: int, match, rng) -> Mutation:
    old = program.statements[index]
    if match is None:
        if old.opcode.startswith("mbarrier.try_wait"):  # it lets everyone pass
            passed = dataclasses.replace(old, opcode="mov.pred", operands=(old.operands[0], "1"))
            return Mutation(index, passed, f"no wait: {old}")
        return Mutation(index, None, f"left out: {old}")
    operand, text = old.operands[place], match[0]
    new = _changed(text, rng)
    operand = operand[: match.start()] + new + operand[match.end() :]
    operands = (*old.operands[:place], operand, *old.operands[place + 1 :])
    return Mutation(index, dataclasses.replace(old, operands=operands), f"{text} -> {new} in {old}")


def _changed(text: str, rng) -> str:
    if text.startswith("0f"):  # twice as large, or 1
        bits = int(text[2:], 16)
        return f"0f{bits + 0x00800000:08X}" if bits & 0x7F800000 else "0f3F800000"
    if re.fullmatch(r"-?\d+|0x[0-9A-Fa-f]+", text):
        value = int(text, 0)
        return str(value + int(rng.choice((-1, 1))) if value > 0 else value + 1)
    return "1"  # a register: the coordinate of another box


def outcome(emulated: Emulated, program: Program, mutation: Mutation, baseline) -> str:
    """ "fault", "differs", a rule, or "survived"."""
    statements = list(program.statements)
    empty = dataclasses.replace(statements[mutation.index], opcode="nop", operands=(), guard=None)
    statements[mutation.index] = mutation.statement or empty
    mutant = dataclasses.replace(program, statements=statements)
    trace: dict[int, list] = {}
    for number, each in enumerate(schedule.ALL):
        try:
            given = dict(limit=4 * baseline.steps + 1000, trace=trace if not number else None)
            found = run.launch(mutant, emulated.grid, emulated.buffers, each, **given)
        except (Fault, Unsupported):
            return "fault"
        if any((a != b).any() for a, b in zip(found, emulated.results, strict=True)):
            return "differs"
    return _rule(program, mutation, baseline.trace, trace)


def _rule(program: Program, mutation: Mutation, before, after) -> str:
    index, opcode = mutation.index, program.statements[mutation.index].opcode
    if index not in before:
        return "not executed"
    if opcode.startswith("setmaxnreg"):
        return "registers"
    hints = opcode.startswith(("prefetch", "mbarrier.try_wait"))
    if hints and mutation.statement and mutation.statement.opcode == opcode:
        return "hint"
    if _ORDERING.match(opcode):
        return "ordered anyway"
    if before[index] == after[index]:
        return "same values"

    def same(opcodes: tuple[str, ...]) -> bool:
        chosen = [i for i, s in enumerate(program.statements) if s.opcode.startswith(opcodes)]
        counts = ((Counter(run.get(i, ())) for run in (before, after)) for i in chosen)
        return all(one == other for one, other in counts)

    if not same(_STORES):
        return "survived"
    return "absorbed" if same(_BRANCHES) else "same stores"


@dataclasses.dataclass
class Baseline:
    """Attributes:
    trace: per statement, what it read and wrote each time it ran.
    steps: of the longest block.
    """

    trace: dict[int, list]
    steps: int


def survey(emulated: Emulated, count: int, seed: int) -> tuple[Counter, list[str]]:
    """How many mutations had which outcome; and the text of those that survived."""
    program, trace = parse(emulated.text), {}
    run.launch(program, emulated.grid, emulated.buffers, schedule.ALL[0], trace=trace)
    baseline = Baseline(trace, sum(map(len, trace.values())))
    outcomes, survivors = Counter(), []
    for kind, mutation in draw(program, count, seed):
        what = outcome(emulated, program, mutation, baseline)
        opcode = program.statements[mutation.index].opcode
        outcomes[f"{opcode.replace('.sync', '') if kind == 'order' else kind}: {what}"] += 1
        if what == "survived":
            survivors.append(mutation.text)
    return outcomes, survivors
