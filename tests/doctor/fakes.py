"""Families of kernels that go wrong in every way there is, for the doctor and whoever runs kernels in processes."""

import os
import signal
import time
from collections.abc import Callable

import jax.numpy as jnp

from specjax.doctor.checker import Case, Checker

# What goes wrong with which op; the others compute what they should.
KINDS = {
    "matmul_w8a16": "compile",
    "matmul_w4a16": "wrong",
    "glue": "hang",
    "tree_attention": "die",
    "matmul_w4a4": "graph",
}


def broken(op: str, reference: Callable) -> Callable:
    """The reference as a kernel, gone wrong in the way of its op; see `specjax.doctor.cases.checker`."""
    kind = KINDS.get(op)

    def kernel(*arguments):
        if kind == "compile":
            raise NotImplementedError("no such layout\nfor these registers")
        if kind == "hang":
            time.sleep(1e6)
        if kind == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        result = reference(*arguments)
        return result * jnp.asarray(1.5, result.dtype) if kind == "wrong" else result

    return kernel


def stuck(op: str, reference: Callable) -> Callable:
    """As `broken`, of which only what hangs and what dies."""
    kind = {"matmul_w8a16": "hang", "tree_attention": "die"}.get(op)

    def kernel(*arguments):
        if kind == "hang":
            time.sleep(1e6)
        if kind == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        return reference(*arguments)

    return kernel


def checker(op: str) -> Checker:
    """A family of two small cases; under "graph" it fails in loops with graphs only."""
    arguments = (jnp.ones((4,)),)
    cases = [
        Case(
            name=f"{size} ones",
            kernel=broken(op, lambda x: x + 1.0),
            reference=lambda x: x + 1.0,
            arguments=arguments,
            tolerance=1e-3,
        )
        for size in ("four", "quatre")
    ]
    family = Checker(cases=cases)
    return _InGraphs(cases=cases) if KINDS.get(op) == "graph" else family


class _InGraphs(Checker):
    """Fails where a whole loop is one graph."""

    def __call__(self, request, stage):
        if request.get("buffers") == "loop":
            stage("running a loop of 2")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(request, stage)


def absent() -> Checker:
    """A family that is not for this machine."""
    return Checker(unavailable="no such GPU")


def unwell() -> Checker:
    """A process that does not start."""
    raise RuntimeError("CUDA_ERROR_SYSTEM_NOT_READY")


def sleeper() -> Callable:
    """A handler that never answers."""

    def handler(request, stage):
        stage("asleep")
        time.sleep(1e6)

    return handler
