"""The host's part of a Mosaic GPU module, MLIR as text: tensor maps and the launch."""

import re

from tests.ptx.block import Launch
from tests.ptx.faults import Unsupported
from tests.ptx.memory import buffer_address
from tests.ptx.tensors import ELEMENT_BITS, MAP_BYTES, TensorMap

_PASS = "IR Dump Before GpuLaunchLoweringPass"
_NEXT = "// -----// IR Dump"
_CUBIN = re.compile(r'bin = "((?:[^"\\]|\\.)*)"')
# Operations that hand on their first operand.
_ALIASES = re.compile(
    r"(?:builtin\.unrealized_conversion_cast|memref\.\w+|llvm\.inttoptr|arith\.index_cast\w*|llvm\.extractvalue|"
    r"llvm\.ptrtoint) (%[\w$#]+)"
)


def section(log: str) -> str:
    """The module before launches are lowered, of Mosaic's log of its passes."""
    begin = log.index(_PASS)
    end = log.find(_NEXT, begin + len(_PASS))
    return log[begin : end if end > 0 else None]


def cubin(module: str) -> bytes:
    """The program in machine code that the module carries, as the assembler of JAX's plugin made it."""
    found = _CUBIN.search(module)
    if found is None:
        raise Unsupported("the module has no binary")
    escaped = re.sub(r"\\([0-9A-Fa-f]{2})", lambda m: chr(int(m[1], 16)), found[1])
    return escaped.replace('\\"', '"').replace("\\\\", "\\").encode("latin-1")


def launch(module: str) -> Launch:
    """The one launch of a module, its constants and stores followed."""
    host = _Host(module)
    for line in module[module.index("llvm.emit_c_interface") :].splitlines():
        line = line.strip()
        if line.startswith("gpu.binary") or host.found:
            break
        found = re.match(r"(%[\w$]+) = (.*)", line)
        host.operation(*(found.groups() if found else (None, line)))
    if host.found is None:
        raise Unsupported("the module launches nothing")
    return host.found


class _Host:
    """Values are integers, ("buffer", number), or (memory, offset)."""

    def __init__(self, module: str):
        arguments = re.search(r"func\.func @\w+\((%\w+)[^,]*, (%\w+)", module)
        self.values: dict = {arguments[2]: ("arguments", 0)}
        self.memory: dict = {}
        self.maps: dict = {}
        self.found: Launch | None = None
        self._memories = 0

    def operation(self, result: str | None, text: str) -> None:
        values = self.values
        if found := re.match(r"llvm\.mlir\.constant\((-?\d+) : i\d+\)", text):
            values[result] = int(found[1])
        elif found := re.match(r"llvm\.getelementptr (%[\w$]+)\[(%?[\w$]+)\]", text):
            self._element(result, *found.groups())
        elif found := re.match(r"llvm\.load (%[\w$]+) : !llvm\.ptr -> !llvm\.(ptr|array)", text):
            place = values[found[1]]
            argument = found[2] == "ptr" and place[0] == "arguments"
            values[result] = ("buffer", place[1]) if argument else place
        elif found := re.match(r"llvm\.insertvalue (%[\w$]+), (%[\w$]+)\[", text):
            inserted = values.get(found[1])
            is_buffer = isinstance(inserted, tuple) and inserted[0] == "buffer"
            values[result] = inserted if is_buffer else values.get(found[2])
        elif text.startswith("llvm.alloca"):
            self._memories += 1
            values[result] = (f"memory {self._memories}", 0)
        elif found := re.match(r"llvm\.store (%[\w$]+), (%[\w$]+) ", text):
            self.memory[values[found[2]]] = values[found[1]]
        elif found := _ALIASES.match(text):
            if found[1] in values:
                values[result] = values[found[1]]
        elif found := re.search(r"call @mosaic_gpu_init_tma_desc\((.*?)\) :", text):
            self._tensor_map(*(part.strip() for part in found[1].split(",")))
        elif text.startswith("gpu.launch_func"):
            self._launch(text)

    def _element(self, result, base: str, offset: str) -> None:
        offset = int(offset) if offset.isdecimal() else self.values.get(offset)
        place = self.values.get(base)
        if isinstance(place, tuple) and offset is not None:
            if place[0] == "buffer" and offset:
                raise Unsupported("a pointer into the middle of an array")
            self.values[result] = (place[0], place[1] + offset)

    def _tensor_map(self, target, pointer, kind, rank, sizes, strides, swizzle, box) -> None:
        values = self.values
        buffer, number = values[pointer]
        if buffer != "buffer":
            raise Unsupported(f"a tensor map of {buffer}")

        def array(name: str) -> list[int]:
            memory, first = values[name]
            return [self.memory[memory, first + axis] for axis in range(values[rank])]

        shape = array(sizes), array(strides), array(box)
        bits = ELEMENT_BITS[values[kind]]
        self.maps[values[target]] = TensorMap.encode(number, bits, *shape, values[swizzle])

    def _launch(self, text: str) -> None:
        found = re.search(
            r"blocks in \((.*?)\) threads in \((.*?)\).*?(?:dynamic_shared_memory_size (%[\w$]+) )?args\((.*)\)",
            text,
        )
        grid, block = (
            [self.values[name.strip()] for name in part.split(",")] for part in found.groups()[:2]
        )
        if "clusters in" in text or block[1:] != [1, 1]:
            raise Unsupported(f"launch {text[:200]}")
        shared = self.values[found[3]] if found[3] else 0
        arguments = [self._argument(part) for part in re.findall(r"(%[\w$]+ : [^,]+)", found[4])]
        self.found = Launch(tuple(grid), block[0], shared, arguments)

    def _argument(self, text: str):
        name, _, kind = text.partition(" : ")
        memory, offset = self.values[name]
        if memory == "buffer":
            return buffer_address(offset)
        count = int(re.search(r"array<(\d+) x i8>", kind)[1]) // MAP_BYTES
        return [self.maps[memory, offset + MAP_BYTES * number] for number in range(count)]
