"""Does the decoding loop run on this device, in this kind of CUDA graph, twice, and with XLA's tokens?

    python -m experiments.loop_check --command_buffers=body --output=rows.jsonl

A few layers of a real shape with random weights decode plainly and with an EAGLE tree. The second run of a program is
where graphs of loops have been seen to crash. Each row says whether both runs gave the same tokens, and how many agree
with those of --backend=xla without graphs; kernels round differently, so a near tie may part the two. Status 1 where
the second run differs from the first, or not even first tokens agree. --versions_only writes what it would run on.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from experiments.shared import common, environment, flag_groups, flags_doctor, random_model, records
from specjax.aot import shapes
from specjax.engine.program import COMMAND_BUFFERS
from specjax.pallas import dispatch

_DRAFTERS = {
    "none": {"kind": "none"},
    "eagle": {"kind": "eagle", "draft_depth": 3, "topk": 4, "num_nodes": 16},
}
_PROMPTS = 3


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    with flag_groups.heading(values, "Model"):
        flags.DEFINE_enum(
            "model_shape", "llama3-8b", list(shapes.CONFIGS), "Sizes.", flag_values=values
        )
        flags.DEFINE_integer("num_layers", 2, "Of them.", lower_bound=1, flag_values=values)
        flags.DEFINE_string("scheme", "w4a16", "Of the weights.", flag_values=values)
        flags.DEFINE_enum(
            *("dtype", "float16", ("float16", "bfloat16", "float32"), "Compute dtype."),
            flag_values=values,
        )
    with flag_groups.heading(values, "Measuring"):
        flags.DEFINE_integer("max_new_tokens", 48, "Per prompt.", lower_bound=2, flag_values=values)
        flags.DEFINE_boolean("versions_only", False, "Run nothing.", flag_values=values)
    with flag_groups.heading(values, "Output"):
        flags.DEFINE_string("output", None, "JSON lines; rows are appended.", flag_values=values)
    with flag_groups.heading(values, "Execution"):
        flags.DEFINE_enum("backend", "auto", dispatch.BACKENDS, "Kernels.", flag_values=values)
        flags.DEFINE_enum(
            *("command_buffers", "loop", COMMAND_BUFFERS, "What CUDA graphs hold."),
            flag_values=values,
        )
        flags_doctor.define(values)


def main(values: flags.FlagValues) -> None:
    """Decodes, compares, writes, prints."""
    output = None if values.output is None else records.check_output(values.output, ".jsonl")

    def keep(row: dict[str, Any]) -> None:
        print(row, flush=True)
        if output is not None:
            records.append_rows(output, [row])

    keep({"record": "environment", **environment.record(), "smi": _smi()})
    if values.versions_only:
        return
    # What fails is left out, but the kind of graph is the question here.
    backend, _ = flags_doctor.choice(values)
    reference = _model(values, "xla", "off")
    prompts = [random_model.prompt(9 + i, reference.config.vocab_size) for i in range(_PROMPTS)]
    wanted = _tokens(reference, "none", prompts, values)
    del reference
    model, bad = _model(values, backend, values.command_buffers), []
    for drafter in _DRAFTERS:
        row = _compared(model, drafter, prompts, wanted, values)
        keep(row)
        if not row["same_twice"] or not row["first_tokens_agree"]:
            bad.append(drafter)
    if bad:
        print(f"error: not as they should be: {', '.join(bad)}", file=sys.stderr)
        sys.exit(1)


def _model(values: flags.FlagValues, backend, buffers: str) -> random_model.RandomModel:
    return random_model.load(
        values.model_shape,
        scheme=values.scheme,
        group_size=64,
        dtype=values.dtype,
        backend=backend,
        dequantize="auto",
        command_buffers=buffers,
        num_layers=values.num_layers,
    )


def _tokens(model, drafter: str, prompts, values: flags.FlagValues) -> list[list[int]]:
    proposer = model.drafter(_DRAFTERS[drafter])
    options = dict(max_new_tokens=values.max_new_tokens, ignore_eos=True)
    return [result.output_ids for result in model.generate(prompts, proposer, **options)]


def _compared(model, drafter: str, prompts, wanted, values: flags.FlagValues) -> dict[str, Any]:
    times, found = [], []
    for _ in range(2):
        begin = time.perf_counter()
        found.append(_tokens(model, drafter, prompts, values))
        times.append(round(time.perf_counter() - begin, 2))
    agreeing = [_common(mine, theirs) for mine, theirs in zip(found[0], wanted, strict=True)]
    return {
        "record": "loop",
        "drafter": drafter,
        "command_buffers": values.command_buffers,
        "same_twice": found[0] == found[1],
        "equal_to_xla": found[0] == wanted,
        "agreeing_tokens": agreeing,
        "first_tokens_agree": all(agreeing),
        "tokens": [len(ids) for ids in found[0]],
        "seconds": times,
        "quarantine": [str(q) for q in dispatch.policy(model.module.backend).quarantine],
    }


def _common(mine: Sequence[int], theirs: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    pairs = zip(mine, theirs, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(mine), len(theirs)))


def _smi() -> str | None:
    """Driver, clocks and what else runs there; None without NVIDIA's tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None or jax.default_backend() != "gpu":
        return None
    fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,memory.used"
    done = subprocess.run(
        [tool, f"--query-gpu={fields}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    return done.stdout.strip()


if __name__ == "__main__":
    common.run(define_flags, main)
