"""What a compiled program launches, read from XLA's dump `*thunk_sequence_after_thunk_passes.txt`.

A line is a thunk, the indented lines below it are inside it: of a while loop its condition and body, of a command
buffer what is captured in it. (The dump without "after_thunk_passes" is from before command buffers are made.)
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LINE = re.compile(r"^(\s*)(\d+): (k\w+)\s*(?:\[[^\]]*\])?\s*(.*)$")
_SECTION = re.compile(r"^(\s*)(condition|body|branch\w*[^:]*|\w[\w ]*):\s*$")
_CONTAINERS = ("kSequential", "kCommandBuffer", "kWhile", "kConditional", "kAsyncStart")
_COPIES = ("kCopy", "kDeviceToDeviceCopy")
# They launch nothing on the device.
_FREE = ("kWaitForStreams", "kPartitionId", "kReplicaId", "kCopyDone", "kAsyncDone")


@dataclass(kw_only=True)
class Thunk:
    """A thunk and what is inside it.

    Attributes:
        kind: XLA's, e.g. "kCustomKernel".
        text: the rest of the line: the kernel's name, its grid.
        section: which part of its parent it belongs to ("condition", "body", a branch), or "".
        captured: it lies within a command buffer.
        inside: thunks below it.
    """

    kind: str
    text: str
    section: str = ""
    captured: bool = False
    inside: list["Thunk"] = field(default_factory=list)

    def walk(self) -> Iterator["Thunk"]:
        """This thunk and all below it."""
        yield self
        for thunk in self.inside:
            yield from thunk.walk()

    def launches(self) -> list["Thunk"]:
        """What is launched on the device when it runs once; loops inside it count once."""
        return [t for t in self.walk() if t.kind not in (*_CONTAINERS, *_FREE)]


def parse(text: str) -> list[Thunk]:
    """The thunks of a dump, outermost first."""
    root = Thunk(kind="root", text="")
    stack: list[tuple[int, Thunk]] = [(-1, root)]
    section = ""
    for line in text.splitlines():
        found = _LINE.match(line)
        if found is None:
            name = _SECTION.match(line)
            if name:
                section = name[2]
            continue
        indent = len(found[1])
        while stack[-1][0] >= indent:
            stack.pop()
        parent = stack[-1][1]
        thunk = Thunk(kind=found[3], text=found[4].strip())
        thunk.captured = parent.captured or parent.kind == "kCommandBuffer"
        thunk.section = section if parent.kind in ("kWhile", "kConditional") else ""
        parent.inside.append(thunk)
        stack.append((indent, thunk))
    return root.inside


def read(dump: Path) -> list[Thunk]:
    """The thunks of the one program whose dump is in the folder.

    Raises:
        FileNotFoundError: there is no such dump.
    """
    files = sorted(dump.glob("*thunk_sequence_after_thunk_passes.txt"))
    if not files:
        files = sorted(dump.glob("*thunk_sequence.txt"))
    if not files:
        raise FileNotFoundError(f"{dump}: no *thunk_sequence*.txt; was XLA told to dump there?")
    return parse(max(files, key=lambda file: file.stat().st_size).read_text())


def summary(thunks: list[Thunk]) -> dict[str, Any]:
    """What one pass of the outermost loop launches, and what of it is in CUDA graphs."""
    everything = [thunk for top in thunks for thunk in top.walk()]
    loops = [thunk for thunk in everything if thunk.kind == "kWhile"]
    if not loops:
        raise ValueError("the program has no loop")
    loop = loops[0]
    body = [launch for part in loop.inside for launch in part.launches()]
    captured = [thunk for thunk in body if thunk.captured]
    inner = [thunk for part in loop.inside for thunk in part.walk() if thunk.kind == "kWhile"]
    return {
        "launches_per_step": len(body),
        "step": dict(Counter(map(label, body)).most_common()),
        "copies_in_loop": sum(thunk.kind in _COPIES for thunk in body),
        "captured_launches": len(captured),
        "loop_in_one_graph": loop.captured,
        "inner_loops": len(inner),
        "command_buffers": [
            f"{len(thunk.launches())} launches"
            + (", loop included" if loop in thunk.walk() else "")
            for thunk in everything
            if thunk.kind == "kCommandBuffer"
        ],
        "not_captured": dict(Counter(label(t) for t in body if not t.captured)),
    }


def label(thunk: Thunk) -> str:
    """A kernel's name without its number, or the kind of anything else."""
    if thunk.kind != "kCustomKernel":
        return thunk.kind.removeprefix("k")
    return re.sub(r"(_\d+)+$", "", thunk.text.split(" ")[0])


_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_MOVE = re.compile(r"= (\w+)\[([\d,]*)\]\S* (copy|transpose|copy-start)\(")
_BITS = re.compile(r"[a-z]+(\d+)")


def large_moves(hlo: str, least: int) -> list[str]:
    """Copies and transposes of at least `least` bytes within the loops of an optimized HLO module."""
    bodies: dict[str, list[str]] = {}
    current: list[str] = []
    for line in hlo.splitlines():
        header = _HEADER.match(line)
        if header:
            current = bodies[header[1]] = []
        elif line.startswith("  "):
            current.append(line.strip())
    waiting, seen = re.findall(r"body=%?([\w.\-]+)", hlo), set()
    found = []
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        text = "\n".join(bodies[name])
        waiting += _CALLED.findall(text)
        waiting += [
            part.strip(" %") for group in _BRANCHES.findall(text) for part in group.split(",")
        ]
        found += [line[:160] for line in bodies[name] if _moved_bytes(line) >= least]
    return found


def _moved_bytes(line: str) -> int:
    move = _MOVE.search(line)
    if move is None:
        return 0
    bits = _BITS.match(move[1])
    size = math.prod(int(value) for value in move[2].split(",") if value)
    return size * (int(bits[1]) if bits else 8) // 8
