"""The GPU that kernels are built for: the one at hand, or one that is only named (ahead-of-time compilation)."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import jax

# Shared memory that one block may ask for, in bytes, by compute capability (CUDA C programming guide, table of limits).
SHARED_MEMORY = {
    (8, 0): 166912,
    (8, 6): 101376,
    (8, 7): 166912,
    (8, 9): 101376,
    (9, 0): 232448,
    (10, 0): 232448,
    (10, 3): 232448,
    (12, 0): 101376,
    (12, 1): 101376,
}
# Compute capabilities that Mosaic kernels are for. On the others Triton's run: Mosaic does not compile for consumer
# Blackwell.
ARCHS = ((9, 0), (8, 0), (8, 6), (8, 7), (8, 9), (10, 0), (10, 3))


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What a kernel needs to know of a GPU before it is built.

    Attributes:
        kind: marketing name, e.g. "NVIDIA H200".
        arch: compute capability, e.g. (9, 0).
        num_sms: streaming multiprocessors.
        shared_memory: bytes of shared memory that one block may use.
    """

    kind: str
    arch: tuple[int, int]
    num_sms: int
    shared_memory: int


_target: contextvars.ContextVar[Gpu | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def targeting(gpu: Gpu) -> Iterator[None]:
    """Programs traced in this context are for `gpu`, whatever this machine has.

    JAX caches traces without regard to it: trace for one GPU per process.
    """
    token = _target.set(gpu)
    try:
        yield
    finally:
        _target.reset(token)


def current() -> Gpu | None:
    """The GPU that programs traced now will run on, or None: there is none, or none that this package knows."""
    return _target.get() or _at_hand()


@functools.cache
def _at_hand() -> Gpu | None:
    if jax.default_backend() != "gpu":
        return None
    gpu = jax.devices()[0]
    capability = str(getattr(gpu, "compute_capability", ""))
    parts = capability.split(".")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        return None
    arch = int(parts[0]), int(parts[1])
    if arch not in SHARED_MEMORY:
        return None
    return Gpu(
        kind=gpu.device_kind,
        arch=arch,
        num_sms=gpu.core_count,
        shared_memory=SHARED_MEMORY[arch],
    )


def unsupported() -> str | None:
    """Why no Mosaic kernel of this package can run here, or None if one can: what an op's `refuses` asks first."""
    gpu = current()
    if gpu is None:
        return "no NVIDIA GPU that this package has kernels for"
    if gpu.arch not in ARCHS:
        known = ", ".join(f"sm_{major}{minor}" for major, minor in ARCHS)
        return f"{gpu.kind} is sm_{gpu.arch[0]}{gpu.arch[1]}; there are Mosaic kernels for {known}"
    return None
