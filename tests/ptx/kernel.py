"""Kernels of Mosaic GPU that run here: `plgpu.kernel` is replaced by compiling for a GPU and emulating the PTX."""

import contextlib
import dataclasses
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from specjax.aot.compile import Compiler
from tests.ptx import host, program, run, schedule
from tests.ptx.block import Launch
from tests.ptx.faults import Fault

# What outputs hold before: NaN in every float format.
_BEFORE = 0xFF


@dataclass
class Emulated:
    """One launch.

    Attributes:
        name: of the kernel.
        text: PTX.
        grid: launch.
        buffers: bytes of inputs, then outputs, before it.
        results: after it.
        cubin: the same kernel in machine code, as JAX's plugin assembled it; empty for others.
        seconds: of compiling and of emulating.
    """

    name: str
    text: str
    grid: Launch
    buffers: list[np.ndarray]
    results: list[np.ndarray] = field(default_factory=list)
    cubin: bytes = b""
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, conditions=schedule.ALL) -> None:
        """Under all conditions, which must not make a difference."""
        begin = time.perf_counter()
        parsed = program.parse(self.text)
        for each in conditions:
            try:
                found = run.launch(parsed, self.grid, self.buffers, each)
            except Fault as fault:
                raise Fault(f"{self.name}, {each}: {fault}") from None
            for one, other in zip(self.results, found, strict=False):
                if (one != other).any():
                    raise Fault(f"{self.name}, {each}: other results than {conditions[0]}")
            self.results = found
        self.seconds["emulate"] = time.perf_counter() - begin


def to_bytes(array) -> np.ndarray:
    """As it lies in memory: 4-bit integers in pairs, the first in the low half."""
    array = np.asarray(array)
    if array.dtype in (jnp.int4, jnp.uint4):
        nibbles = array.astype(np.int8).view(np.uint8).reshape(-1, 2) & 15
        return nibbles[:, 0] | nibbles[:, 1] << 4
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1)


def from_bytes(octets: np.ndarray, like):
    if like.dtype in (jnp.int4, jnp.uint4):
        raise NotImplementedError(f"results of {like.dtype}")
    return jnp.asarray(octets.view(np.dtype(like.dtype)).reshape(like.shape))


class Emulator:
    """Runs kernels for one GPU.

    Attributes:
        launches: those that ran.
        conditions: what each runs under.
    """

    def __init__(self, compiler: Compiler, conditions=schedule.ALL):
        self.compiler, self.conditions = compiler, conditions
        self.launches: list[Emulated] = []

    @contextlib.contextmanager
    def installed(self) -> Iterator["Emulator"]:
        """Mosaic's kernels called with arrays are emulated; traced ones are as ever."""
        real = plgpu.kernel

        def kernel(body, *, interpret=None, out_type=(), **how):
            built = real(body, out_type=out_type, **how)

            def call(*arrays):
                if any(isinstance(array, jax.core.Tracer) for array in arrays):
                    return built(*arrays)
                plgpu.kernel = real
                try:
                    return self._call(built, arrays, out_type)
                finally:
                    plgpu.kernel = kernel

            return call

        plgpu.kernel = kernel
        try:
            yield self
        finally:
            plgpu.kernel = real

    def _call(self, built, arrays, out_type):
        outputs, structure = jax.tree.flatten(out_type)
        changed = [isinstance(array, jax.Ref) for array in arrays]
        given = [array[...] if ref else array for array, ref in zip(arrays, changed, strict=True)]
        emulated = self.compile(_pure(built, changed), given)
        before = [np.full(each.size * each.dtype.itemsize, _BEFORE, np.uint8) for each in outputs]
        emulated.buffers = [*map(to_bytes, given), *before]
        emulated.run(self.conditions)
        self.launches.append(emulated)
        for place, ref in enumerate(changed):
            if ref:
                arrays[place][...] = from_bytes(emulated.results[place], given[place])
        results = emulated.results[len(given) :]
        return jax.tree.unflatten(structure, map(from_bytes, results, outputs))

    def compile(self, function, arrays) -> Emulated:
        """The one Mosaic kernel in a function of arrays, for the GPU of this process; without buffers."""
        folder = self.compiler.mosaic_dump
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        abstract = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
        compiled = self.compiler.compile(
            lambda arguments: function(*arguments), {"arguments": abstract}, name="kernel"
        )
        shutil.rmtree(compiled.dump, ignore_errors=True)
        (text,) = folder.rglob("*.ptx")
        log = text.with_name(f"{text.stem}.mlir-passes.log").read_text()
        module = host.section(log)
        used = re.search(r"Used (\d+) registers", text.with_suffix(".ptxas").read_text())
        return Emulated(
            name=text.stem,
            text=text.read_text(),
            grid=dataclasses.replace(host.launch(module), registers=int(used[1])),
            buffers=[],
            cubin=host.cubin(module),
            seconds={"compile": compiled.seconds},
        )


def _pure(built, changed: list[bool]):
    """The kernel as a function of arrays, those that it changes in place included."""

    def call(*arrays):
        given = [
            jax.new_ref(array) if ref else array for array, ref in zip(arrays, changed, strict=True)
        ]
        out = built(*given)
        return out, [jax.freeze(array) for array, ref in zip(given, changed, strict=True) if ref]

    return call
