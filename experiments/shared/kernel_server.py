"""Checking and timing kernels on request, in a process that a kernel may take down: see `specjax.doctor.workers`."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.shared import environment, kernel_jobs
from experiments.shared import kernel_timing as timing
from experiments.shared.kernel_jobs import Job
from specjax.doctor import workers
from specjax.errors import ConfigError
from specjax.pallas import device
from specjax.pallas.matmul import specs, tiles
from specjax.pallas.matmul.plan import Config

ENTRY = f"{__name__}:Server"
TOLERANCE = {"float16": 2e-3, "bfloat16": 4e-3}
LIMITS = {
    "read_bandwidth": lambda: timing.read_bandwidth(4 << 30),
    "matmul_rate": lambda: timing.matmul_rate(8192),
}
# Calls in one program where many tiles are tried.
_TUNING_LINKS = 16


@dataclasses.dataclass(kw_only=True)
class Server:
    """Handler of the requests below.

    Attributes:
        dtype: of float inputs.
        command_buffers: what CUDA graphs hold in timed programs.
        times: time kernels, not only compare them with their references.
        peers: time XLA's own products too.
        kernels: "package.module:function" whose results take the kernels' place, as in `specjax.doctor.cases.checker`;
            then no GPU is needed.
    """

    dtype: str = "float16"
    command_buffers: str = "loop"
    times: bool = True
    peers: bool = True
    kernels: str | None = None

    def __call__(self, request: dict[str, Any], stage: Callable[[str], None]) -> dict[str, Any]:
        """{"device": True}: what the device is. {"limits": True}: what it reaches. {"op", "shape", "rows", "context",
        "limits"}: a row of results. {"op", "shape", "rows", "config"}: the seconds that a product takes with these
        tiles.
        """
        if "device" in request:
            return self._device()
        if "limits" in request and "op" not in request:
            return {name: _value(measured) for name, measured in LIMITS.items()}
        if "config" in request:
            return self._with_tiles(request, stage)
        stage("drawing the arguments")
        return self._row(self._job(request), request["limits"], stage)

    def _device(self) -> dict[str, Any]:
        gpu = self._gpu()
        if gpu is None:
            return {"missing": jax.devices()[0].device_kind}
        return {"gpu": dataclasses.asdict(gpu), "environment": environment.record()}

    def _gpu(self) -> device.Gpu | None:
        if self.kernels is not None:
            return device.current() or tiles.typical((9, 0))
        return device.current() if jax.default_backend() == "gpu" else None

    def _job(self, request: dict[str, Any]) -> Job:
        op, rows = request["op"], request["rows"]
        if op == "tree_attention":
            job = kernel_jobs.attention_job(request["shape"], request["context"], rows, self.dtype)
        else:
            spec = specs.of(op)[request["shape"]]
            job = kernel_jobs.matmul_job(spec, rows, self.dtype, self._gpu().arch)
        if self.kernels is None:
            return job
        kernel = workers.entry(self.kernels)(op, job.reference)
        # Tiles are no business of what stands in.
        return dataclasses.replace(job, kernel=lambda *args, config=None: kernel(*args))

    def _row(self, job: Job, limits: dict[str, float], stage) -> dict[str, Any]:
        x, weights = job.draw_x(1), job.rotated_weights() if self.times else [job.draw_weights(2)]
        stage("the kernel, to compare")
        got = np.asarray(jax.jit(job.kernel)(x, *weights[0]), np.float64)
        wanted = np.asarray(jax.jit(job.reference)(x, *weights[0]), np.float64)
        error = float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)))
        row = {
            "relative_error": error if math.isfinite(error) else None,
            "correct": error <= TOLERANCE[self.dtype],
            "bytes": job.num_bytes,
            "flops": job.flops,
        }
        if not self.times:
            return row
        stage("the kernel, timed")
        try:
            return row | self._timed(job, x, weights, limits, stage)
        except Exception as error:  # what was compared is known nevertheless
            return row | {"error": workers.described(error), **_lost()}

    def _timed(self, job: Job, x, weights, limits, stage) -> dict[str, Any]:
        buffers = self.command_buffers
        times = timing.seconds_per_call(job.kernel, x, weights, command_buffers=buffers)
        seconds = float(np.median(times))
        row = {
            "us": seconds * 1e6,
            "us_quartiles": [float(q) * 1e6 for q in np.percentile(times, [25, 75])],
        }
        if len(limits) == len(LIMITS):
            floor = max(job.num_bytes / limits["read_bandwidth"], job.flops / limits["matmul_rate"])
            row["roofline_us"] = floor * 1e6
            row["roofline_share"] = floor / seconds if seconds > 0 else None
        if self.peers:
            stage("XLA's own, timed")
            row |= self._peers(job, x, weights)
        return row

    def _peers(self, job: Job, x, weights) -> dict[str, float]:
        few, buffers = weights[: max(1, len(weights) // 4)], self.command_buffers
        times = timing.seconds_per_call(job.reference, x, few, 8, buffers)
        found = {"xla_us": float(np.median(times)) * 1e6}
        if job.shape_nk is not None:
            dense = kernel_jobs.dense_peer(job)
            times = timing.seconds_per_call(
                *(dense.kernel, dense.draw_x(99), dense.rotated_weights()), command_buffers=buffers
            )
            found["cublas_bf16_us"] = float(np.median(times)) * 1e6
        return found

    def _with_tiles(self, request: dict[str, Any], stage) -> dict[str, Any]:
        job, x, weights = self._drawn(request["op"], request["shape"], request["rows"])
        stage(f"tiles {request['config']}")
        kernel = functools.partial(job.kernel, config=Config(**request["config"]))
        times = timing.seconds_per_call(kernel, x, weights, _TUNING_LINKS)
        return {"seconds": float(np.median(times))}

    def _drawn(self, op: str, shape: str, rows: int) -> tuple:
        """A job with its arguments; weights are those of the last request for this shape."""
        if getattr(self, "_weights_of", None) != (op, shape):
            job = self._job({"op": op, "shape": shape, "rows": rows})
            spec = specs.of(op)[shape]
            self._weights = [kernel_jobs.draw_weight(spec, 2 + i) for i in range(job.copies)]
            self._weights_of, self._jobs = (op, shape), {}
        if rows not in self._jobs:
            job = self._job({"op": op, "shape": shape, "rows": rows})
            weights = [job.draw_weights(2 + i, w) for i, w in enumerate(self._weights)]
            self._jobs[rows] = job, job.draw_x(1), weights
        return self._jobs[rows]


def gpu_of(found: dict[str, Any]) -> device.Gpu:
    """The GPU of an answer to {"device": True}.

    Raises:
        ConfigError: there is none, or the process did not start.
    """
    if "error" in found:
        raise ConfigError(f"the process of kernels did not start: {found['error']}")
    if "missing" in found:
        raise ConfigError(
            f"kernels need an NVIDIA GPU that Mosaic supports; JAX has {found['missing']}. "
            "Without one, experiments.aot_compile tells what the kernels take"
        )
    return device.Gpu(**found["gpu"] | {"arch": tuple(found["gpu"]["arch"])})


def _value(measured: Callable[[], float]) -> float | str:
    try:
        return float(measured())
    except Exception as error:
        return workers.described(error)


def _lost() -> dict[str, Any]:
    """Nothing if the device still answers."""
    return {} if timing.device_answers() else {"device_lost": True}


class Local:
    """Answers in this process: for tests, and where processes cost more than a fault would."""

    def __init__(self, server: Server):
        self._server = server

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """As `specjax.doctor.workers.Worker`, without its limit."""
        del seconds
        try:
            return self._server(request, lambda stage: None)
        except Exception as error:
            return {"error": workers.described(error), **_lost()}

    def close(self) -> None:
        """Nothing to end."""
