"""Compares drafters on one model: what does speculation buy against plain decoding through the same loop?

    python -m experiments.bench_decode --model=smollm2-135m --drafters=none,ngram --prompts_file=prompts.jsonl \\
        --repeats=5 --max_new_tokens=96 --output=results.jsonl
    python -m experiments.bench_decode --model=DIR --drafters_file=specs.json --prompts_file=... --output=...

Prompts run in groups of --batch_size, each group as one dispatch. All drafters take turns on every group, in an
order that rotates from repeat to repeat, so that a drifting machine hits all of them alike; a first round compiles
and is not counted. --output receives one row per drafter and repeat ("record": "run") and one per drafter
("record": "summary"), each with the whole configuration, versions and device; rows are appended. `none` is always
among the drafters.

--preset=all-methods (or --drafters=all) compares every drafter that the model has, with those that
--draft_checkpoints=DIR,DIR (heads, models) make possible. --trace prints what every step drafted, accepted and added.

    python -m experiments.bench_decode --preset=all-methods --model=DIR --prompts_file=prompts.jsonl --trace

--random_weights=llama3-8b takes random weights of that shape in place of a model, and --synthetic_acceptance=3.9
imposes a mean acceptance length: speeds of a loop for which no checkpoint is at hand, marked "synthetic" in every row.

    python -m experiments.bench_decode --random_weights=llama3-8b --scheme=w4a16 --synthetic_acceptance=3.9 \\
        --drafters_file=experiments/presets/random_eagle.json --output=results.jsonl

The fastest plain decoding of a device may be that of another dtype than speculation's best: --baseline_dtype=float32
with --dtype=bfloat16 adds it as `none (float32)`, and speed-ups relate to it. Outputs are compared within a dtype.

--roofline measures, in the same process, the streaming-read bandwidth, the bytes of a step and a bare jitted step, and
relates plain decoding of the first prompt to them ("record": "roofline").
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from rich.console import Console
from rich.table import Table

import specjax
from experiments.shared import (
    common,
    contest,
    environment,
    flag_groups,
    flags_doctor,
    flags_model,
    flags_sampling,
    methods,
    naming,
    preset,
    prompt_files,
    random_model,
    records,
    roofline,
    tables,
    traces,
)
from specjax.aot import shapes
from specjax.config import DTYPES
from specjax.errors import ConfigError


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    flags_sampling.define(values)
    flags_model.define(values, required=False)
    preset.define_flags(values)
    with flag_groups.heading(values, "Input"):
        flags.DEFINE_string("prompts_file", None, "JSON lines of prompts.", flag_values=values)
    with flag_groups.heading(values, "Drafter"):
        flags.DEFINE_list(
            "drafters", None, "Names of drafters, or `all` that the model has.", flag_values=values
        )
        flags.DEFINE_string(
            "drafters_file", None, "JSON list of drafter specs.", flag_values=values
        )
        flags.DEFINE_list(
            "draft_checkpoints",
            [],
            "Heads and draft models for --drafters=all.",
            flag_values=values,
        )
    with flag_groups.heading(values, "Model"):
        flags.DEFINE_enum(
            "random_weights",
            None,
            list(shapes.CONFIGS),
            "Instead of --model: random weights of this shape, under --scheme (default: dense).",
            flag_values=values,
        )
        flags.DEFINE_integer("group_size", 128, "Of random weights; -1: none.", flag_values=values)
    _define_measuring_flags(values)


def _define_measuring_flags(values: flags.FlagValues) -> None:
    """What is measured beside the drafters, and where it goes."""
    with flag_groups.heading(values, "Measuring"):
        flags.DEFINE_integer("repeats", 5, "Counted rounds.", lower_bound=1, flag_values=values)
        flags.DEFINE_boolean(
            "trace", False, "Print every step of the first prompt, per drafter.", flag_values=values
        )
        flags.DEFINE_enum(
            "baseline_dtype",
            None,
            DTYPES,
            "Relate speed-ups to plain decoding in this dtype. Default: --dtype.",
            flag_values=values,
        )
        flags.DEFINE_boolean(
            "roofline",
            False,
            "Relate plain decoding to bandwidth and a bare step.",
            flag_values=values,
        )
        flags.DEFINE_integer(
            "stream_mb",
            1024,
            "Array that --roofline reads, in MiB.",
            lower_bound=1,
            flag_values=values,
        )
        flags.DEFINE_float(
            "synthetic_acceptance",
            None,
            "Impose this mean acceptance length (bonus included) on random weights.",
            flag_values=values,
        )
        flags.DEFINE_integer(
            "prompt_tokens", 1024, "Prompt of random weights.", lower_bound=1, flag_values=values
        )
    with flag_groups.heading(values, "Output"):
        flags.DEFINE_string("output", None, "JSON lines; rows are appended.", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Measures, writes, prints the table."""
    preset.apply(values, needs_model=values.random_weights is None)
    random_model.check(values)
    specs = methods.chosen(values)
    random = values.random_weights is not None
    if random and values.baseline_dtype is not None:
        raise ConfigError("--baseline_dtype needs --model; --random_weights have one dtype")
    if random and flags_model.depth_config(values) is not None:
        raise ConfigError("--random_weights have no routers; drop the flags of depth")
    if values.roofline and values.max_new_tokens < 2:
        raise ConfigError(
            "--roofline needs --max_new_tokens of at least 2: the first token is prefill's"
        )
    output = None if values.output is None else records.check_output(values.output, ".jsonl")
    model, prompts, encoded, options = _prepared(values, specs)
    config = _config(values, model)
    contestants = [
        contest.Contestant(
            name=naming.label(spec),
            facts={"drafter": naming.label(spec), "spec": naming.full_spec(spec)},
            model=model,
            drafter=model.drafter(spec),
        )
        for spec in specs
    ]
    plain, *drafting = contestants
    baseline = _baseline(values, model) or plain
    if baseline is not plain:
        contestants.insert(0, baseline)
    with flags_model.profiled(values):
        contest.measure(contestants, encoded, values.repeats, options)
    summaries = [
        contest.summarize(
            contestant, baseline, "none", reference=baseline if contestant is baseline else plain
        )
        for contestant in contestants
    ]
    if values.trace:
        for contestant in drafting:
            print(contestant.name)
            traces.print_trace(model, contestant.drafter, encoded[0], options)
    ids = [prompt["id"] for prompt in prompts]
    rows = [
        row for contestant in contestants for row in contest.run_rows(contestant, ids)
    ] + summaries
    print_table(summaries)
    if random:
        print("synthetic: random weights" + _imposed(values))
    if values.roofline:
        measured = _roofline(model, encoded[0], values)
        print(roofline.describe(measured))
        rows.append({"record": "roofline", **measured})
    if output is not None:
        records.append_rows(output, [row | {"config": config} for row in rows])
        print(f"{len(rows)} rows -> {output}")


def _prepared(values: flags.FlagValues, specs: Sequence[dict[str, Any]]):
    """Model, prompts, their token ids and the options of generation: real ones, or those of random weights."""
    options = flags_sampling.options(values)
    if values.random_weights is None:
        prompts = prompt_files.read_prompts(values.prompts_file)
        model = flags_model.load_model(values, specs)
        encoded = prompt_files.encode(model, prompts, values.prompts_file, values.max_length)
        return model, prompts, encoded, options
    model = _random_model(values)
    options["ignore_eos"] = True
    if values.synthetic_acceptance is not None:
        options["acceptance"] = random_model.synthetic(values.synthetic_acceptance)
    encoded = [random_model.prompt(values.prompt_tokens, model.config.vocab_size)]
    return model, [{"id": "random"}], encoded, options


def _baseline(values: flags.FlagValues, model: specjax.LanguageModel) -> contest.Contestant | None:
    """Plain decoding in --baseline_dtype; None where that is the model's own."""
    if values.baseline_dtype in (None, model.dtype_name):
        return None
    other = flags_model.load_model(values, dtype=values.baseline_dtype)
    name = f"none ({values.baseline_dtype})"
    facts = {"drafter": name, "spec": {"kind": "none"}, "dtype": values.baseline_dtype}
    return contest.Contestant(name=name, facts=facts, model=other, drafter=other.drafter("none"))


def _random_model(values: flags.FlagValues) -> random_model.RandomModel:
    dtype = values.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    backend, command_buffers = flags_doctor.choice(values)
    return random_model.load(
        values.random_weights,
        scheme=values.scheme,
        group_size=values.group_size,
        dtype=dtype,
        backend=backend,
        dequantize=values.dequantize,
        command_buffers=command_buffers,
    )


def _roofline(model: specjax.LanguageModel, prompt: list[int], values: flags.FlagValues) -> dict:
    room = model.config.max_position_embeddings - len(prompt)
    new_tokens = min(values.max_new_tokens, room)
    return roofline.measure(model, prompt, new_tokens, values.repeats, values.stream_mb)


def _config(values: flags.FlagValues, model: specjax.LanguageModel) -> dict[str, Any]:
    return {
        **flags_model.model_config(values),
        "dtype": model.dtype_name,
        "baseline_dtype": values.baseline_dtype,
        "backend": values.backend,
        "dequantize": values.dequantize,
        "command_buffers": values.command_buffers,
        **flags_sampling.options(values),
        "prompts_file": None if values.prompts_file is None else Path(values.prompts_file).name,
        **_random_config(values),
        "repeats": values.repeats,
        "environment": environment.record(),
    }


def _imposed(values: flags.FlagValues) -> str:
    mean = values.synthetic_acceptance
    return "" if mean is None else f", acceptance length {mean} imposed where something is drafted"


def _random_config(values: flags.FlagValues) -> dict[str, Any]:
    """What was random or imposed; nothing for real models."""
    if values.random_weights is None:
        return {}
    names = ("random_weights", "group_size", "prompt_tokens", "synthetic_acceptance")
    return {"synthetic": True, **{name: values[name].value for name in names}}


def print_table(summaries: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """Prints summaries as a table."""
    table = Table()
    widest = max(len(row["drafter"]) for row in summaries)
    table.add_column("drafter", overflow="fold", min_width=min(widest, 40))
    routed = any("executed_fraction" in row for row in summaries)
    headers = (*contest.SPEED_HEADERS, "steps", "new tokens", *(["layers run"] if routed else []))
    for header in (*headers, "equals none"):
        table.add_column(header, justify="right")
    for row in summaries:
        table.add_row(
            row["drafter"] + ("" if row["lossless"] else " (lossy)"),
            *contest.speed_cells(row),
            str(row["num_spec_steps"]),
            str(row["new_tokens"]),
            *([tables.number(row["executed_fraction"], ".1%")] if routed else []),
            contest.equal_cell(row, "none"),
        )
    contest.show(table, console)


if __name__ == "__main__":
    common.run(define_flags, main)
