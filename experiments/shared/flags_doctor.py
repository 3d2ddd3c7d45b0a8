"""--doctor and --doctor_dir: what is known of the kernels on this machine, for whoever loads a model."""

import dataclasses
import logging
from pathlib import Path

import jax
from absl import flags

from specjax import doctor
from specjax.engine.program import CommandBuffers
from specjax.files import hub
from specjax.pallas import device, dispatch, tuned

_log = logging.getLogger(__name__)


def define(values: flags.FlagValues) -> None:
    """Both flags; the caller gives the heading."""
    flags.DEFINE_boolean(
        "doctor",
        True,
        "On a GPU, check the kernels the first time (see experiments.doctor) and leave out what fails.",
        flag_values=values,
    )
    define_folder(values)


def define_folder(values: flags.FlagValues) -> None:
    """Where verdicts are kept."""
    flags.DEFINE_string(
        "doctor_dir",
        None,
        "Verdicts on kernels. Default: specjax/doctor in the user's cache.",
        flag_values=values,
    )


def folder(values: flags.FlagValues) -> Path:
    """Of verdicts."""
    if values.doctor_dir is not None:
        return Path(values.doctor_dir)
    return hub.default_cache_dir() / "specjax" / "doctor"


def tuned_folder(values: flags.FlagValues) -> Path:
    """Of tiles that were measured on this machine (experiments.doctor --tune)."""
    return (
        folder(values).with_name("tuned") if values.doctor_dir is None else folder(values) / "tuned"
    )


def choice(values: flags.FlagValues) -> tuple[dispatch.Backend, CommandBuffers]:
    """--backend without what fails here, and what CUDA graphs may hold.

    Unknown machines are checked first, which takes a minute or two. --backend=xla needs no check: it launches no
    kernel of this package.
    """
    backend, buffers = values.backend, values.command_buffers
    if not values.doctor or backend == "xla" or jax.default_backend() != "gpu":
        return backend, buffers
    if device.current() is None:
        return backend, buffers
    found = doctor.known_or_checked(folder(values), on_verdict=_tell)
    if not values["command_buffers"].present:
        usual, buffers = buffers, found.command_buffers()
        if buffers != usual:
            _log.warning("CUDA graphs fail here: --command_buffers=%s is implied", buffers)
    policy = found.policy(backend)
    tables = tuned.tables_in(tuned_folder(values), device.current().kind)
    policy = dataclasses.replace(policy, tuned=tables)
    return (policy if policy.quarantine or tables else backend), buffers


def _tell(verdict: doctor.Verdict) -> None:
    why = f": {verdict.reason}" if verdict.state in ("fails", "unchecked") else ""
    _log.warning(
        "first run of these kernels on this GPU, checking: %s %s %s%s",
        *(verdict.op, verdict.backend, verdict.state, why),
    )
