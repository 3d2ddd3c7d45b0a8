"""What do ten minutes on a GPU tell? Every step a process with its own limit, those first that decide the most.

    python -m experiments.gpu_session --output=OUT
    python -m experiments.gpu_session --output=OUT --steps=versions,doctor,loops --seconds=240

OUT/session.jsonl has a row when a step starts and one when it ends; OUT/STEP.log what it printed, OUT/STEP.jsonl its
results, row by row as they are known. A step that fails, hangs or dies costs its own time only, and nothing is begun
after --seconds. Needs nothing but an installed JAX for CUDA with flax, and no network; programs that one step compiled
are the next one's too (--compile_cache_dir). JAX runs in the steps, never in this process.
"""

import importlib.util
import json
import shutil
import sys
import tempfile
from pathlib import Path

from absl import flags

from experiments.shared import common, flag_groups
from experiments.shared.steps import Session, Step

_BUFFERS = ("loop", "body", "off")
_NODES = (32, 64)
_MATMULS = ("matmul_w4a16", "matmul_w4a8,matmul_w4a4", "matmul_w8a16,matmul_w8a8,tree_attention")
_TESTS = ("tests/pallas/test_matmul_gpu.py",)


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    with flag_groups.heading(values, "Measuring"):
        flags.DEFINE_list("steps", None, "Only these, in their order.", flag_values=values)
        flags.DEFINE_float("seconds", 540.0, "For all.", lower_bound=1.0, flag_values=values)
        flags.DEFINE_string("model_shape", "llama3-8b", "Whose shapes to time.", flag_values=values)
        flags.DEFINE_float(
            "patience", 1.0, "Scales every step's limit.", lower_bound=0.01, flag_values=values
        )
        flags.DEFINE_string(
            "kernels",
            None,
            "MODULE:FUNCTION whose results stand in for kernels, to try the session without a GPU.",
            flag_values=values,
        )
    with flag_groups.heading(values, "Output"):
        flags.DEFINE_string("output", None, "Folder of results.", flag_values=values)
        flags.DEFINE_integer(
            *("most_mb", 60, "That the folder may hold, in MiB."),
            lower_bound=1,
            flag_values=values,
        )
    with flag_groups.heading(values, "Execution"):
        flags.DEFINE_string(
            *("compile_cache_dir", None, "Compiled programs. Default: a temporary folder."),
            flag_values=values,
        )
        flags.DEFINE_integer(
            *("parallel", 6, "Processes that compile at a time."), lower_bound=1, flag_values=values
        )
    flags.mark_flag_as_required("output", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Runs the steps; status 1 where one did not end well."""
    output = Path(values.output)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-session-") as scratch:
        settings = {
            "JAX_COMPILATION_CACHE_DIR": values.compile_cache_dir or str(Path(scratch, "programs")),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        session = Session(
            folder=output.resolve(),
            seconds=values.seconds,
            settings=settings,
            most_bytes=values.most_mb << 20,
            tell=lambda row: print(json.dumps(row), flush=True),
        )
        rows = session.run(chosen(values, Path(scratch)))
    bad = [row["step"] for row in rows if row["state"] != "done"]
    if bad:
        print(f"not as they should be: {', '.join(bad)}", file=sys.stderr)
        sys.exit(1)


def chosen(values: flags.FlagValues, scratch: Path) -> list[Step | tuple[Step, ...]]:
    """The steps that --steps names; default: all.

    Raises:
        flags.ValidationError: there is no such step.
    """
    groups = all_steps(values, scratch)
    if values.steps is None:
        return list(groups.values())
    unknown = [name for name in values.steps if name not in groups]
    if unknown:
        raise flags.ValidationError(
            f"--steps: {unknown[0]!r} is unknown; known: {', '.join(groups)}"
        )
    return [group for name, group in groups.items() if name in values.steps]


def all_steps(values: flags.FlagValues, scratch: Path) -> dict[str, Step | tuple[Step, ...]]:
    """Everything there is to know, what decides most first; groups run at the same time."""
    verdicts = scratch / "doctor"
    stand_in = [] if values.kernels is None else [f"--kernels={values.kernels}"]
    known = [] if values.kernels is not None else [f"--doctor_dir={verdicts}"]
    # Without a GPU there is no float16 to speak of.
    few = [] if values.kernels is None else ["--dtype=float32", "--max_new_tokens=6"]
    shape = values.model_shape

    def step(name: str, seconds: float, why: str, module: str, *arguments: str) -> Step:
        command = (sys.executable, "-m", module, *arguments, f"--output={{out}}/{name}.jsonl")
        return Step(name=name, seconds=seconds * values.patience, why=why, command=command)

    def kernels(name: str, seconds: float, why: str, *arguments: str) -> Step:
        limits = f"--total_seconds={0.9 * seconds * values.patience}", "--kernel_seconds=20"
        arguments = (*arguments, *stand_in, *limits)
        return step(name, seconds, why, "experiments.bench_kernel", *arguments)

    def decode(name: str, seconds: float, specs: list) -> Step:
        file = scratch / f"{name}.json"
        file.write_text(json.dumps(specs))
        return step(
            *(name, seconds, "speed of an 8B model of random weights", "experiments.bench_decode"),
            *(f"--random_weights={shape}", "--scheme=w4a16", f"--drafters_file={file}", *known),
            *("--repeats=2", "--max_new_tokens=128", "--synthetic_acceptance=3.9"),
        )

    return {
        "versions": step(
            *("versions", 40, "what everything below ran on", "experiments.loop_check"),
            "--versions_only",
        ),
        "doctor": step(
            *("doctor", 110, "which kernels work at all", "experiments.doctor"),
            *(f"--parallel={values.parallel}", "--total_seconds=100", "--case_seconds=40"),
            *(stand_in or known),
        ),
        "loops": tuple(
            step(
                *(f"loop-{mode}", 90, "whether loops in CUDA graphs run, twice"),
                *("experiments.loop_check", f"--command_buffers={mode}"),
                *(f"--model_shape={shape}", *known, *few),
            )
            for mode in _BUFFERS
        ),
        "numerics": tuple(
            kernels(
                *(f"numerics-{number}", 100, "numbers of all kinds of weights", "--notimes"),
                *(f"--ops={ops}", "--m=1,8,17,64", f"--shapes={shape}", "--contexts=1024"),
            )
            for number, ops in enumerate(_MATMULS)
        ),
        "times": kernels(
            *("times", 110, "whether the kernels are near the roofline", f"--shapes={shape}"),
            *("--ops=matmul_w4a16,matmul_w4a8,tree_attention", "--m=8,16,64"),
        ),
        "decode": decode("decode-none", 70, ["none"]),
        **{
            f"decode-{nodes}": decode(f"decode-{nodes}", 70, ["none", _eagle(nodes)])
            for nodes in _NODES
        },
        "profile": Step(
            name="profile",
            seconds=60 * values.patience,
            why="what limits gate_up: DRAM, L2, issue slots or the tensor cores",
            command=_profile(shape),
        ),
        "tuning": kernels(
            *("tuning", 120, "tiles that are faster than the heuristic's", "--notimes"),
            *("--write_tuned", "--tune_minutes=1.5", "--tuned_dir={out}/tuned"),
            *(f"--shapes={shape}", "--ops=matmul_w4a16", "--m=8,64"),
        ),
        "tests": Step(
            name="tests",
            seconds=300 * values.patience,
            why="the rest",
            command=_tests(),
        ),
    }


def _eagle(nodes: int) -> dict:
    small = {"vocabulary_size": 32768, "scheme": "w8a16"}
    return {"kind": "eagle", "draft_depth": 6, "topk": 10, "num_nodes": nodes} | small


def _profile(shape: str) -> tuple[str, ...]:
    """Nsight Compute around one kernel at two numbers of rows; where it is not installed the step says so."""
    tool = shutil.which("ncu") or "ncu"
    return (
        *(tool, "--clock-control", "none", "--target-processes", "all", "--kernel-name"),
        *("regex:matmul_w4a16", "--launch-count", "8", "--section", "SpeedOfLight"),
        *("--section", "ComputeWorkloadAnalysis", "--section", "MemoryWorkloadAnalysis"),
        *(sys.executable, "-m", "experiments.bench_kernel", "--ops=matmul_w4a16", "--m=8,64"),
        *(f"--shapes={shape}", "--notimes", "--noprocesses"),
    )


def _tests() -> tuple[str, ...]:
    """Those for GPUs, as `make test-gpu` runs them; xdist only where there is one."""
    options = ("-n", "4") if importlib.util.find_spec("xdist") else ()
    return (
        *(sys.executable, "-m", "pytest", "-m", "gpu", "-o", "addopts=", "-o", "minversion=7"),
        *("--import-mode=importlib", "-ra", "-W", "ignore::pytest.PytestConfigWarning"),
        *(*options, *_TESTS),
    )


if __name__ == "__main__":
    common.run(define_flags, main)
