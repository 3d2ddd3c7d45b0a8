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

--roofline measures, in the same process, the streaming-read bandwidth, the bytes of a step and a bare jitted step, and
relates plain decoding of the first prompt to them ("record": "roofline").
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import specjax
from experiments import (
    common,
    environment,
    methods,
    preset,
    random_model,
    records,
    roofline,
    tables,
    traces,
)
from specjax.aot import shapes
from specjax.drafters import registry
from specjax.errors import ConfigError


@dataclass(kw_only=True)
class Contestant:
    """A drafter and what was measured of it.

    Attributes:
        spec: as given.
        drafter: built for the model.
        runs: per repeat the results of every group; the first repeat is the warm-up.
    """

    spec: dict[str, Any]
    drafter: Any
    runs: list[list[list[specjax.GenerationResult]]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return common.label(self.spec)

    @property
    def outputs(self) -> list[list[int]]:
        """Tokens of every prompt, of the warm-up."""
        return [result.output_ids for group in self.runs[0] for result in group]


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    common.define_model_flags(values, required=False)
    common.define_sampling_flags(values)
    preset.define_flags(values)
    flags.DEFINE_list(
        "drafters", None, "Names of drafters, or `all` that the model has.", flag_values=values
    )
    flags.DEFINE_list(
        "draft_checkpoints", [], "Heads and draft models for --drafters=all.", flag_values=values
    )
    flags.DEFINE_boolean(
        "trace", False, "Print every step of the first prompt, per drafter.", flag_values=values
    )
    flags.DEFINE_string("drafters_file", None, "JSON list of drafter specs.", flag_values=values)
    flags.DEFINE_string("prompts_file", None, "JSON lines of prompts.", flag_values=values)
    flags.DEFINE_enum(
        "random_weights",
        None,
        list(shapes.CONFIGS),
        "Instead of --model: random weights of this shape, under --scheme (default: dense).",
        flag_values=values,
    )
    flags.DEFINE_integer("group_size", 128, "Of random weights; -1: none.", flag_values=values)
    flags.DEFINE_integer(
        "prompt_tokens", 1024, "Prompt of random weights.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_float(
        "synthetic_acceptance",
        None,
        "Impose this mean acceptance length (bonus included) on random weights.",
        flag_values=values,
    )
    flags.DEFINE_integer("repeats", 5, "Counted rounds.", lower_bound=1, flag_values=values)
    flags.DEFINE_string("output", None, "JSON lines; rows are appended.", flag_values=values)
    flags.DEFINE_boolean(
        "roofline", False, "Relate plain decoding to bandwidth and a bare step.", flag_values=values
    )
    flags.DEFINE_integer(
        "stream_mb", 1024, "Array that --roofline reads, in MiB.", lower_bound=1, flag_values=values
    )


def main(values: flags.FlagValues) -> None:
    """Measures, writes, prints the table."""
    preset.apply(values, needs_model=values.random_weights is None)
    random_model.check(values)
    specs = _specs(values)
    random = values.random_weights is not None
    if random and common.depth_config(values) is not None:
        raise ConfigError("--random_weights have no routers; drop the flags of depth")
    prompts = [] if random else records.read_prompts(values.prompts_file)
    if values.roofline and values.max_new_tokens < 2:
        raise ConfigError(
            "--roofline needs --max_new_tokens of at least 2: the first token is prefill's"
        )
    output = None if values.output is None else records.check_output(values.output, ".jsonl")
    options = common.options(values)
    if random:
        model = _random_model(values)
        prompts = [{"id": "random"}]
        encoded = [random_model.prompt(values.prompt_tokens, model.config.vocab_size)]
        options["ignore_eos"] = True
        if values.synthetic_acceptance is not None:
            options["acceptance"] = random_model.synthetic(values.synthetic_acceptance)
    else:
        model = common.load_model(values, specs)
        encoded = records.encode(model, prompts, values.prompts_file, values.max_length)
    config = _config(values, model)
    contestants = [Contestant(spec=spec, drafter=model.drafter(spec)) for spec in specs]
    with common.profiled(values):
        measure(model, contestants, encoded, values.repeats, options)
    summaries = [summarize(contestant, contestants[0]) for contestant in contestants]
    if values.trace:
        for contestant in contestants[1:]:
            print(contestant.name)
            traces.print_trace(model, contestant.drafter, encoded[0], options)
    ids = [prompt["id"] for prompt in prompts]
    rows = [row for contestant in contestants for row in _run_rows(contestant, ids)] + summaries
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


def _random_model(values: flags.FlagValues) -> random_model.RandomModel:
    dtype = values.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return random_model.load(
        values.random_weights,
        scheme=values.scheme,
        group_size=values.group_size,
        dtype=dtype,
        backend=values.backend,
        dequantize=values.dequantize,
    )


def _roofline(model: specjax.LanguageModel, prompt: list[int], values: flags.FlagValues) -> dict:
    room = model.config.max_position_embeddings - len(prompt)
    new_tokens = min(values.max_new_tokens, room)
    return roofline.measure(model, prompt, new_tokens, values.repeats, values.stream_mb)


def _specs(values: flags.FlagValues) -> list[dict[str, Any]]:
    """Drafter specs, `none` first, without repetitions."""
    if (values.drafters is None) == (values.drafters_file is None):
        raise ConfigError("give either --drafters=NAME,NAME or --drafters_file=FILE")
    if values.draft_checkpoints and values.drafters != ["all"]:
        raise ConfigError("--draft_checkpoints are for --drafters=all")
    if values.drafters == ["all"]:
        if values.model is None:
            raise ConfigError("--drafters=all needs --model")
        specs = methods.available(values.model, values.draft_checkpoints, values.dequantize)
    elif values.drafters is not None:
        specs = [registry.parse(name) for name in values.drafters]
    else:
        try:
            specs = json.loads(Path(values.drafters_file).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{values.drafters_file}: not valid JSON: {error}") from None
        if not isinstance(specs, list):
            raise ConfigError(f"{values.drafters_file}: expected a list of drafter specs")
        specs = [registry.parse(spec) if isinstance(spec, str) else spec for spec in specs]
        for spec in specs:
            registry.check(spec)
    unique = []
    for spec in [{"kind": "none"}, *specs]:
        if spec not in unique:
            unique.append(spec)
    return unique


def _config(values: flags.FlagValues, model: specjax.LanguageModel) -> dict[str, Any]:
    return {
        **common.model_config(values),
        "dtype": model.dtype_name,
        "backend": values.backend,
        "dequantize": values.dequantize,
        **common.options(values),
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


def measure(
    model: specjax.LanguageModel,
    contestants: Sequence[Contestant],
    prompts: Sequence[list[int]],
    repeats: int,
    options: dict[str, Any],
) -> None:
    """Fills in the contestants' runs: a warm-up and `repeats` counted rounds over all prompts."""
    size = options["batch_size"]
    starts = range(0, len(prompts), size)
    total = (repeats + 1) * len(starts) * len(contestants)
    with tqdm(total=total, unit="run", disable=None) as bar:
        for repeat in range(repeats + 1):
            for contestant in contestants:
                contestant.runs.append([])
            for start in starts:
                shift = repeat % len(contestants)
                for contestant in [*contestants[shift:], *contestants[:shift]]:
                    bar.set_postfix_str(("warm-up " if repeat == 0 else "") + contestant.name)
                    group = prompts[start : start + size]
                    numbers = range(start, start + len(group))
                    results = model.generate_iter(
                        group, contestant.drafter, request_ids=numbers, **options
                    )
                    ordered = sorted(results, key=lambda pair: pair[0])
                    contestant.runs[-1].append([result for _, result in ordered])
                    bar.update()


def total_metrics(groups: Sequence[Sequence[specjax.GenerationResult]]) -> dict[str, Any]:
    """Metrics of one round over all groups.

    The requests of a group start together, so its time is that of the one that ran longest.
    """
    each = [result.metrics for group in groups for result in group]
    longest = [max(group, key=lambda result: result.metrics.decode_ms).metrics for group in groups]
    decode_ms = sum(metrics.decode_ms for metrics in longest)
    total = specjax.Metrics(
        num_spec_steps=sum(metrics.num_spec_steps for metrics in each),
        num_draft_tokens=sum(metrics.num_draft_tokens for metrics in each),
        acceptance_histogram=_sums(each, "acceptance_histogram"),
        prefill_ms=sum(metrics.prefill_ms for metrics in longest),
        decode_ms=decode_ms,
        compile_ms=sum(metrics.compile_ms for metrics in longest),
        batch_size=each[0].batch_size,
        new_tokens=sum(metrics.new_tokens for metrics in each),
        lossless=each[0].lossless,
        layer_runs=_sums(each, "layer_runs"),
        inner_acceptance_histogram=_sums(each, "inner_acceptance_histogram"),
    )
    # Every request's first token is prefill's.
    decoded = total.new_tokens - len(each)
    rate = decoded / decode_ms * 1e3 if decode_ms > 0 else None
    return total.to_dict() | {"tokens_per_s": rate}


def _sums(each: Sequence[specjax.Metrics], name: str) -> tuple[int, ...] | None:
    """Histograms added up; None where they are."""
    rows = [getattr(metrics, name) for metrics in each]
    return None if None in rows else tuple(np.sum(rows, axis=0).tolist())


def _run_rows(contestant: Contestant, ids: Sequence[Any]) -> list[dict[str, Any]]:
    """One row per counted round."""
    rows = []
    for repeat, groups in enumerate(contestant.runs[1:]):
        results = [result for group in groups for result in group]
        per_prompt = [
            {
                "id": name,
                "new_tokens": result.metrics.new_tokens,
                "num_spec_steps": result.metrics.num_spec_steps,
                "decode_ms": result.metrics.decode_ms,
            }
            for name, result in zip(ids, results, strict=True)
        ]
        rows.append(
            {
                "record": "run",
                "drafter": contestant.name,
                "spec": common.full_spec(contestant.spec),
                "repeat": repeat,
                **total_metrics(groups),
                "per_prompt": per_prompt,
            }
        )
    return rows


def summarize(contestant: Contestant, baseline: Contestant) -> dict[str, Any]:
    """Medians over the counted rounds; the speed-up is the median of the rounds' own ratios to the baseline."""
    rounds = [total_metrics(groups) for groups in contestant.runs[1:]]
    base = [total_metrics(groups)["tokens_per_s"] for groups in baseline.runs[1:]]
    rates = [metrics["tokens_per_s"] for metrics in rounds]
    known = None not in rates and None not in base
    pairs = zip(contestant.outputs, baseline.outputs, strict=True)
    summary = {
        "record": "summary",
        "drafter": contestant.name,
        "spec": common.full_spec(contestant.spec),
        "repeats": len(rounds),
        "tokens_per_s": float(np.median(rates)) if known else None,
        "tokens_per_s_quartiles": np.percentile(rates, [25, 75]).tolist() if known else None,
        "tokens_per_s_range": [min(rates), max(rates)] if known else None,
        "speedup": float(np.median(np.divide(rates, base))) if known else None,
        "num_prompts": len(contestant.outputs),
        "outputs_equal_to_none": sum(mine == theirs for mine, theirs in pairs),
        "warmup_compile_ms": total_metrics(contestant.runs[0])["compile_ms"],
    }
    return {**rounds[0], **summary}


def print_table(summaries: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """Prints summaries as a table."""
    console = console or Console()
    if not console.is_terminal:
        console.width = 120
    table = Table()
    widest = max(len(row["drafter"]) for row in summaries)
    table.add_column("drafter", overflow="fold", min_width=min(widest, 40))
    headers = ("tokens/s", "quartiles", "speed-up", "acceptance length", "steps", "new tokens")
    routed = any("executed_fraction" in row for row in summaries)
    for header in (*headers, *(["layers run"] if routed else []), "equals none"):
        table.add_column(header, justify="right")
    for row in summaries:
        quartiles = row["tokens_per_s_quartiles"]
        equal, count = row["outputs_equal_to_none"], row["num_prompts"]
        table.add_row(
            row["drafter"] + ("" if row["lossless"] else " (lossy)"),
            tables.number(row["tokens_per_s"], ".1f"),
            "-" if quartiles is None else f"{quartiles[0]:.1f} - {quartiles[1]:.1f}",
            tables.number(row["speedup"], ".2f"),
            tables.number(row["mean_acceptance_length"], ".2f"),
            str(row["num_spec_steps"]),
            str(row["new_tokens"]),
            *([tables.number(row["executed_fraction"], ".1%")] if routed else []),
            "yes" if equal == count else f"no ({equal} of {count})",
        )
    console.print(table)


if __name__ == "__main__":
    common.run(define_flags, main)
