"""Do the kernels work on this GPU? Every family in a process of its own; what fails is put into quarantine.

    python -m experiments.doctor
    python -m experiments.doctor --families=matmul_w4a16,tree_attention --output=verdicts.jsonl

Each family is compiled, run and compared with its reference at 5 to 8 small shapes, without CUDA graphs and in loops
with each kind of them. A process that hangs or dies costs its family only. Verdicts are kept in --doctor_dir for this
device, driver and versions; the other binaries read them there (--nodoctor ignores them), and make them where there are
none. Status 1 where a family fails. --tune then tries tiles of the products for --tune_minutes, in processes too, and
keeps the fastest beside the verdicts, where the other binaries find them.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from absl import flags
from rich.table import Table

from experiments.shared import (
    common,
    contest,
    environment,
    flag_groups,
    flags_doctor,
    kernel_jobs,
    kernel_server,
    kernel_tuning,
    records,
)
from specjax import doctor
from specjax.doctor import verdicts as keeping
from specjax.doctor import workers
from specjax.errors import ConfigError

_STYLES = {"fails": "bold red", "passes": "green"}


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    with flag_groups.heading(values, "Measuring"):
        flags.DEFINE_list("families", None, "Ops to check. Default: all.", flag_values=values)
        flags.DEFINE_float(
            "case_seconds", 60.0, "For one shape.", lower_bound=0.1, flag_values=values
        )
        flags.DEFINE_float(
            "total_seconds", 300.0, "For all families.", lower_bound=1.0, flag_values=values
        )
        flags.DEFINE_integer("parallel", 4, "Processes.", lower_bound=1, flag_values=values)
        flags.DEFINE_string(
            "kernels",
            None,
            "MODULE:FUNCTION whose results stand in for kernels; nothing is kept then.",
            flag_values=values,
        )
        flags.DEFINE_boolean("tune", False, "Try tiles, too.", flag_values=values)
        flags.DEFINE_float("tune_minutes", 10.0, "Try no tiles after that.", flag_values=values)
        flags.DEFINE_string(
            "tune_shape", "llama3-8b", "Model whose weights to tune for.", flag_values=values
        )
    with flag_groups.heading(values, "Output"):
        flags.DEFINE_string("output", None, "JSON lines; rows are appended.", flag_values=values)
    with flag_groups.heading(values, "Execution"):
        flags_doctor.define_folder(values)


def main(values: flags.FlagValues) -> None:
    """Checks, keeps, prints the table."""
    output = None if values.output is None else records.check_output(values.output, ".jsonl")
    families = chosen(values.families, values.kernels)
    limits = doctor.Limits(
        case_seconds=values.case_seconds,
        total_seconds=values.total_seconds,
        parallel=values.parallel,
    )

    def tell(verdict: doctor.Verdict) -> None:
        print(f"{verdict.op} {verdict.backend}: {verdict.state}", flush=True)
        if output is not None:
            records.append_rows(output, [row(verdict)])

    found = doctor.check(families, limits, tell)
    if values.kernels is None:
        folder = flags_doctor.folder(values)
        print(f"verdicts -> {keeping.write(folder, _merged(folder, found))}")
    if output is not None:
        summary = {"record": "doctor", "command_buffers": found.command_buffers()}
        records.append_rows(output, [summary | {"environment": environment.record()}])
    contest.show(table(found))
    print(f"CUDA graphs may hold: {found.command_buffers()}")
    if values.tune:
        _tune(values, found)
    if any(verdict.state == "fails" or verdict.graphs for verdict in found.families):
        sys.exit(1)


def _tune(values: flags.FlagValues, found: doctor.Verdicts) -> None:
    """Tiles of the products that pass, through the kernel benchmark's tuner."""
    passing = {v.op for v in found.families if v.state == "passes" and v.backend == "mosaic"}
    ops = [op for op in kernel_jobs.OPS if op in passing and op.startswith("matmul")]
    if not ops:
        raise ConfigError("--tune: no product passes on Mosaic here, so there are no tiles to try")
    worker = workers.Worker(kernel_server.ENTRY, {"times": False, "kernels": values.kernels})
    with worker:
        gpu = kernel_server.gpu_of(worker.ask({"device": True}, 60))
        written = kernel_tuning.write_tuned(
            *(ops, [values.tune_shape], [8, 16, 64], gpu, worker),
            seconds=values.tune_minutes * 60,
            kernel_seconds=30,
            folder=flags_doctor.tuned_folder(values),
        )
    for path, names in written.items():
        print(f"tuned tiles of {', '.join(names)} -> {path}")


def chosen(names: list[str] | None, kernels: str | None) -> list[doctor.Family]:
    """The families of these ops, `kernels` in place of their own.

    Raises:
        ConfigError: there is no such op.
    """
    known = {family.op for family in doctor.FAMILIES}
    for name in names or ():
        if name not in known:
            raise ConfigError(f"--families: {name!r} is unknown; known: {', '.join(sorted(known))}")
    families = [family for family in doctor.FAMILIES if names is None or family.op in names]
    if kernels is None:
        return families
    return [
        dataclasses.replace(
            family, arguments={"op": family.op, "backend": family.backend, "kernels": kernels}
        )
        for family in families
    ]


def _merged(folder: Path, found: doctor.Verdicts) -> doctor.Verdicts:
    """With what the folder knows of families that were not checked now."""
    known = keeping.read(folder, found.identity)
    fresh = {(v.op, v.backend): v for v in found.families if v.state != "unchecked"}
    before = {} if known is None else {(v.op, v.backend): v for v in known.families}
    return dataclasses.replace(found, families=tuple((before | fresh).values()))


def row(verdict: doctor.Verdict) -> dict[str, Any]:
    """A verdict as a row of results."""
    return {"record": "family", **dataclasses.asdict(verdict)}


def table(found: doctor.Verdicts) -> Table:
    """The verdicts for people."""
    shown = Table(title=f"{found.identity['device']}, jax {found.identity['jax']}")
    for header in ("family", "backend", "verdict", "shapes", "seconds", "why"):
        shown.add_column(header, justify="right" if header in ("shapes", "seconds") else "left")
    for verdict in found.families:
        why = [verdict.reason] if verdict.reason else []
        why += [f"graphs ({mode}): {reason}" for mode, reason in verdict.graphs.items()]
        shown.add_row(
            *(verdict.op, verdict.backend, verdict.state, str(verdict.cases)),
            *(f"{verdict.seconds:.1f}", "; ".join(why)),
            style=_STYLES.get(verdict.state),
        )
    return shown


if __name__ == "__main__":
    common.run(define_flags, main)
