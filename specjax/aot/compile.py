"""Lowering and compiling for a target, one process per target.

Mosaic GPU keeps the architecture of the first topology that a process made, and where there is no device it takes sm_90
for granted. So `in_process` starts a process for each target, in which a `Compiler` says which GPU is meant.
"""

import contextlib
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from specjax.aot import topology
from specjax.aot.topology import Target
from specjax.errors import ConfigError, SpecjaxError
from specjax.pallas import device

_BAD_INPUT = 2


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A program compiled for a target.

    Attributes:
        executable: `jax.stages.Compiled`.
        seconds: time to trace, lower and compile.
        dump: folder with XLA's dumps of this program.
    """

    executable: Any
    seconds: float
    dump: Path


class Compiler:
    """Compiles functions of abstract arguments for one GPU. Only for a process that compiles for no other.

    Args:
        target: the GPU.
        output: folder for dumps; Mosaic's are in `mosaic` below it, Triton's in `triton`.
    """

    def __init__(self, target: Target, output: Path):
        self.target, self.output = target, output
        self.mosaic_dump, self.triton_dump = output / "mosaic", output / "triton"
        self._mesh = topology.mesh(target)
        self._sharding = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())

    def abstract(self, tree):
        """A pytree of arrays or shapes as shapes on the target."""

        def place(leaf):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._sharding)

        return jax.tree.map(place, tree)

    def compile(
        self,
        function: Callable,
        arguments: dict[str, Any],
        *,
        name: str,
        donate: tuple[str, ...] = (),
        static: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
    ) -> Compiled:
        """Compiles `function(**arguments, **static)`; `options` are XLA's, as of `jax.jit(compiler_options=...)`."""
        dump = self.output / "xla" / name
        dump.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        jitted = jax.jit(
            function, donate_argnames=donate, static_argnames=tuple(static or ()), inline=False
        )
        with self.targeted():
            traced = jitted.trace(**self.abstract(arguments), **(static or {}))
            lowered = traced.lower(lowering_platforms=("cuda",))
            executable = lowered.compile(
                compiler_options={"xla_dump_to": str(dump), **(options or {})}
            )
        return Compiled(executable=executable, seconds=time.perf_counter() - begin, dump=dump)

    @contextlib.contextmanager
    def targeted(self) -> Iterator[None]:
        """Traces and lowers for the target: our kernels ask `device.current`, Mosaic asks its own functions."""
        from jax.experimental.mosaic.gpu import core, utils

        inferred = utils._infer_arch
        utils._infer_arch = lambda: self.target.arch
        try:
            with (
                device.targeting(self.target),
                core.artificial_shared_memory_limit(self.target.shared_memory),
                jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh),
            ):
                yield
        finally:
            utils._infer_arch = inferred


def in_process(
    entry: str,
    target: str,
    output: Path,
    arguments: dict[str, Any],
    dump_kernels: bool = False,
) -> Any:
    """Runs `entry`, "package.module:function", as function(compiler, **arguments) in a process of its own.

    Args:
        target: name in `topology.TARGETS`.
        output: folder for dumps and for `compile.log`.
        arguments: JSON-ready.
        dump_kernels: Mosaic writes PTX and reports of every kernel to `output`/mosaic (36 MB of logs for each), Triton
            to `output`/triton.
    Returns:
        what the function returned, which must be JSON-ready.

    Raises:
        ConfigError: unknown target, or bad input found by the function.
        SpecjaxError: the process failed; the message ends with the end of its log.
    """
    topology.lookup(target)
    output.mkdir(parents=True, exist_ok=True)
    report, log = output / ".report.json", output / "compile.log"
    report.unlink(missing_ok=True)
    job = dict(entry=entry, target=target, output=str(output.resolve()), arguments=arguments)
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }
    if dump_kernels:
        (output / "mosaic").mkdir(exist_ok=True)
        settings["MOSAIC_GPU_DUMP_TO"] = str((output / "mosaic").resolve())
        settings["JAX_TRITON_DUMP_DIR"] = str((output / "triton").resolve())
    command = ["env", *(f"{name}={value}" for name, value in settings.items())]
    command += [sys.executable, "-m", "specjax.aot.compile", json.dumps(job)]
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode or not report.exists():
        lines = log.read_text(errors="replace").strip().splitlines()
        if done.returncode == _BAD_INPUT and lines and lines[-1].startswith("error: "):
            raise ConfigError(lines[-1].removeprefix("error: "))
        tail = " | ".join(lines[-3:])
        raise SpecjaxError(
            f"compiling for {target} failed with status {done.returncode}, see {log}: {tail}"
        )
    result = json.loads(report.read_text())
    report.unlink()
    return result


def _child(job: dict[str, Any]) -> int:
    """What `in_process` starts."""
    output = Path(job["output"])
    module, _, name = job["entry"].partition(":")
    function = getattr(importlib.import_module(module), name)
    try:
        result = function(Compiler(topology.lookup(job["target"]), output), **job["arguments"])
    except SpecjaxError as error:
        print("error:", " ".join(str(error).split()))
        return _BAD_INPUT
    (output / ".report.json").write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(_child(json.loads(sys.argv[1])))
