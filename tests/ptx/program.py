"""PTX text -> registers, labels and statements of its one entry."""

import re
from dataclasses import dataclass, field

from tests.ptx import values
from tests.ptx.faults import Unsupported

_LABEL = re.compile(r"([$\w]+):(?!:)")
_IGNORED = (".loc", ".file", ".pragma", ".section")
_NAME = re.compile(r"(?<![\w%$.])([A-Za-z_]\w*)")


@dataclass(frozen=True)
class Statement:
    """Attributes:
    opcode: with all modifiers.
    operands: as written, registers of inner scopes renamed.
    guard: register of the predicate, or None.
    negated: the predicate has to be false.
    scopes: numbers of the scopes around it, outermost first.
    """

    opcode: str
    operands: tuple[str, ...]
    guard: str | None
    negated: bool
    scopes: tuple[int, ...]

    def __str__(self):
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}"


@dataclass
class Program:
    """Attributes:
    parameters: names, in order.
    registers: name -> type.
    statements: in the order of the text.
    labels: (name, scope) -> index of the next statement.
    tables: name -> labels, of `.branchtargets`.
    shared: name -> (offset, bytes) of variables in shared memory; dynamic ones have 0 bytes.
    """

    parameters: list[str] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    statements: list[Statement] = field(default_factory=list)
    labels: dict[tuple[str, int], int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)

    def target(self, name: str, scopes: tuple[int, ...]) -> int:
        """Index of the statement behind a label that is seen from `scopes`."""
        for scope in reversed(scopes):
            if (name, scope) in self.labels:
                return self.labels[name, scope]
        raise Unsupported(f"label {name} is unknown")


def split(text: str) -> list[str]:
    """Operands: split at commas outside of brackets."""
    parts, depth, begin = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and not depth:
            parts.append(text[begin:place].strip())
            begin = place + 1
    return [*parts, text[begin:].strip()] if text[begin:].strip() else parts


def parse(text: str) -> Program:
    """The program of the only `.visible .entry` of a module."""
    text = re.sub(r"//[^\n]*", "", text)
    entries = text.count(".visible .entry")
    if entries != 1:
        raise Unsupported(f"{entries} entries in a module; one is supported")
    start = text.index(".visible .entry")
    opening = text.index("{", start)
    reader = _Reader(Program(parameters=re.findall(r"(\w+_param_\d+)", text[start:opening])))
    for declaration in re.findall(r"^\s*(?:\.extern\s+)?\.shared[^;]*;", text[:start], re.M):
        reader.shared(declaration.strip().rstrip(";"))
    reader.body(text[opening + 1 :])
    return reader.program


class _Reader:
    """Reads a body; inner scopes have their own names of registers and labels."""

    def __init__(self, program: Program):
        self.program = program
        self.names: list[dict[str, str]] = [{}]
        self.scopes, self.scopes_seen = [0], 0

    def body(self, text: str) -> None:
        place = 0
        while self.names:
            while text[place].isspace():
                place += 1
            label = _LABEL.match(text, place)
            if text[place] == "{":
                self.scopes_seen += 1
                self.names.append({})
                self.scopes.append(self.scopes_seen)
                place += 1
            elif text[place] == "}":
                self.names.pop()
                self.scopes.pop()
                place += 1
            elif label:
                self.program.labels[label[1], self.scopes[-1]] = len(self.program.statements)
                place = label.end()
            elif text.startswith(_IGNORED, place):
                place = text.index("\n", place)
            else:
                end = text.index(";", place)
                self.statement(" ".join(text[place:end].split()))
                place = end + 1

    def statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self.registers(text)
        elif text.startswith(".shared"):
            self.shared(text)
        elif text.startswith(".branchtargets"):
            here = len(self.program.statements)
            name = [label for (label, _), at in self.program.labels.items() if at == here][-1]
            self.program.tables[name] = split(text.partition(" ")[2])
        elif text.startswith("."):
            raise Unsupported(f"directive {text}")
        elif text:
            self.instruction(text)

    def registers(self, text: str) -> None:
        _, kind, names = text.split(None, 2)
        values.storage(kind[1:])
        for name in split(names):
            numbered = re.fullmatch(r"(.+)<(\d+)>", name)
            family = [name]
            if numbered:
                family = [f"{numbered[1]}{number}" for number in range(int(numbered[2]))]
            for member in family:
                unique = member if len(self.scopes) == 1 else f"{member}@{self.scopes[-1]}"
                self.names[-1][member] = unique
                self.program.registers[unique] = kind[1:]

    def shared(self, text: str) -> None:
        found = re.search(r"\.b8 (\w+)(?:\[(\d*)\])?$", text)
        if found is None:
            raise Unsupported(f"declaration {text}")
        place = sum(size for _, size in self.program.shared.values())
        self.program.shared[found[1]] = (place, int(found[2] or 0))

    def instruction(self, text: str) -> None:
        inner = {name: unique for names in self.names[1:] for name, unique in names.items()}
        if inner:
            text = _NAME.sub(lambda found: inner.get(found[1], found[1]), text)
        guard, negated = None, False
        if guarded := re.fullmatch(r"@(!?)([%\w@]+)\s+(.*)", text):
            negated, guard, text = guarded[1] == "!", guarded[2], guarded[3]
        opcode, _, operands = text.partition(" ")
        self.program.statements.append(
            Statement(opcode, tuple(split(operands)), guard, negated, tuple(self.scopes))
        )
