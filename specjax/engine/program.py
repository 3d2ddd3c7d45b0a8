"""Compiled programs: one executable per shape, compile time measured apart from run time."""

import time
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

from specjax.errors import ConfigError

CommandBuffers = Literal["loop", "body", "off"]
COMMAND_BUFFERS: tuple[str, ...] = get_args(CommandBuffers)

# What command buffers may hold: XLA's defaults but for conditionals, which need drivers that know them in graphs.
_IN_A_BODY = ("FUSION", "CUBLAS", "CUBLASLT", "CUDNN", "CUSTOM_CALL", "DYNAMIC_SLICE_FUSION")
_HELD = {"loop": (*_IN_A_BODY, "CONDITIONAL", "WHILE"), "body": _IN_A_BODY}


def gpu_options(command_buffers: CommandBuffers = "loop") -> dict[str, Any]:
    """Compiler options of XLA on NVIDIA GPUs.

    Args:
        command_buffers: "loop": a whole loop is one CUDA graph, whatever its length; "body": its body is one or
            several, launched from the host step by step; "off": no graphs.

    Raises:
        ConfigError: none of them.
    """
    if command_buffers not in COMMAND_BUFFERS:
        raise ConfigError(f"{command_buffers=}: supported are {', '.join(COMMAND_BUFFERS)}")
    if command_buffers == "off":
        # An empty list, and, should a version of XLA read that as its default, no graph long enough.
        return {"xla_gpu_enable_command_buffer": "", "xla_gpu_graph_min_graph_size": 1 << 30}
    return {
        "xla_gpu_enable_command_buffer": ",".join(_HELD[command_buffers]),
        "xla_gpu_graph_min_graph_size": 1,
    }


class Program:
    """A function compiled ahead of time for every combination of argument shapes that it meets.

    Unlike a plain `jax.jit` it tells how long compiling took, so that reported speeds never contain it, and how often
    it happened.

    Attributes:
        options: of the compiler, where there is a GPU.
    """

    def __init__(
        self,
        function: Callable,
        *,
        donate: tuple[str, ...] = (),
        static: tuple[str, ...] = (),
        command_buffers: CommandBuffers = "loop",
    ):
        self.options = gpu_options(command_buffers)
        self._jitted = jax.jit(function, donate_argnames=donate, static_argnames=static)
        self._static = static
        self._compiled: dict[Any, Any] = {}
        self.num_compilations = 0
        self.compile_ms = 0.0

    def __call__(self, **kwargs):
        """Runs the function; arguments go by keyword."""
        dynamic = {name: value for name, value in kwargs.items() if name not in self._static}
        return self.compiled(**kwargs)(**dynamic)

    def peak_bytes(self) -> int:
        """Device memory of the largest executable so far: arguments, results and temporaries."""
        sizes = [executable.memory_analysis() for executable in self._compiled.values()]
        return max(
            stats.argument_size_in_bytes
            + stats.output_size_in_bytes
            + stats.temp_size_in_bytes
            - stats.alias_size_in_bytes
            for stats in sizes
        )

    def compiled(self, **kwargs):
        """The executable for arguments of these shapes (for `memory_analysis`, `as_text`)."""
        leaves, structure = jax.tree.flatten(
            {name: value for name, value in kwargs.items() if name not in self._static}
        )
        static = tuple(kwargs[name] for name in self._static)
        key = (structure, static, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if key not in self._compiled:
            begin = time.perf_counter()
            options = self.options if jax.default_backend() == "gpu" else None
            self._compiled[key] = self._jitted.lower(**kwargs).compile(compiler_options=options)
            self.compile_ms += (time.perf_counter() - begin) * 1e3
            self.num_compilations += 1
        return self._compiled[key]


class Bound:
    """A function whose first arguments stay: their leaves are flattened once, and calls go through jit's own dispatch.

    What looks often, and has little to do in between, calls this one: with 80 layers a `Program` spends milliseconds on
    naming the shapes of its arguments.

    Args:
        function: takes `fixed`, then keyword arguments.
        donate, static: names of keyword arguments.
        counter: called whenever an executable is made.
    """

    def __init__(
        self,
        function: Callable,
        fixed: tuple[Any, ...],
        counter: Callable[[], None],
        *,
        donate: tuple[str, ...] = (),
        static: tuple[str, ...] = (),
        command_buffers: CommandBuffers = "loop",
    ):
        self._leaves, structure = jax.tree.flatten(fixed)

        def run(leaves, /, **arguments):
            counter()  # this body runs when JAX traces it, which is when it compiles
            return function(*jax.tree.unflatten(structure, leaves), **arguments)

        on_gpu = jax.default_backend() == "gpu"
        self._jitted = jax.jit(
            run,
            donate_argnames=donate,
            static_argnames=static,
            compiler_options=gpu_options(command_buffers) if on_gpu else None,
        )

    def __call__(self, **arguments):
        return self._jitted(self._leaves, **arguments)
