"""Finds the draft tree that pays on this device, and whether any does.

    python -m experiments.tune --model=smollm2-135m --draft_checkpoint=HEAD --output=tuned.json
    python -m experiments.generate --model=smollm2-135m --tuned=tuned.json --prompt=...

Measures the target's pass over 1, 2, 4, ... rows, the time to draft trees of these sizes, and, by decoding the prompts
with each size, how many drafted tokens are accepted. From these the cost model of `specjax.drafters.tuning` chooses
the number of nodes and the depth, or no drafting at all. Works for drafters with `num_nodes` (EAGLE) and for chains.
"""

import json
from pathlib import Path

import numpy as np
from absl import flags
from rich.table import Table
from tqdm import tqdm

from experiments import step_times
from experiments.shared import (
    common,
    contest,
    environment,
    flag_groups,
    flags_drafter,
    flags_model,
    prompt_files,
    records,
)
from specjax.drafters import registry, tuning
from specjax.errors import ConfigError

_PROMPTS = Path(__file__).resolve().parent / "presets" / "demo.jsonl"


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    flags_model.define(values)
    flags_drafter.define(values, default="eagle")
    with flag_groups.heading(values, "Input"):
        flags.DEFINE_string("prompts_file", str(_PROMPTS), "Prompts to decode.", flag_values=values)
        flags.DEFINE_integer("limit", 8, "Prompts to take.", lower_bound=1, flag_values=values)
    with flag_groups.heading(values, "Sampling"):
        flags.DEFINE_integer("max_new_tokens", 64, "Per prompt.", lower_bound=8, flag_values=values)
    with flag_groups.heading(values, "Measuring"):
        flags.DEFINE_list(
            "sizes", "2,3,4,6,8,12,16,32,60", "Nodes of the trees to try.", flag_values=values
        )
        flags.DEFINE_integer("repeats", 9, "Timed calls; the median counts.", flag_values=values)
        flags.DEFINE_float(
            "margin",
            0.05,
            "Gain below which drafting stays off.",
            lower_bound=0.0,
            flag_values=values,
        )
    with flag_groups.heading(values, "Output"):
        flags.DEFINE_string("output", None, "JSON file for --tuned.", flag_values=values)
    flags.mark_flag_as_required("output", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Measures, chooses, writes, prints."""
    output = records.check_output(values.output, ".json")
    if values.tuned is not None:
        raise ConfigError("--tuned is what this binary makes; use --output")
    base = flags_drafter.spec(values)
    sizes = _sizes(values)
    specs = {size: _sized(base, size) for size in sizes}
    prompts = prompt_files.read_prompts(values.prompts_file)[: values.limit]
    model = flags_model.load_model(values, [base])
    encoded = prompt_files.encode(model, prompts, values.prompts_file, None)
    prompt = max(encoded, key=len)
    verify_ms, propose_ms, acceptance = {}, {}, {}
    with tqdm(total=2 * len(sizes), unit="measurement") as bar:
        for size, spec in specs.items():
            rows = [size] if verify_ms else [1, size]
            verify, drafting = _times(model, spec, rows, prompt, values.repeats)
            verify_ms |= verify
            propose_ms[size] = {spec["draft_depth"]: drafting}
            shallow = spec | {"draft_depth": 1}
            if shallow != spec and size <= _largest(shallow):
                propose_ms[size][1] = _times(model, shallow, [], prompt, values.repeats)[1]
            bar.update()
            acceptance[size] = _accepted(model, spec, encoded, values.max_new_tokens)
            bar.update()
    costs = tuning.Costs(verify_ms=verify_ms, propose_ms=propose_ms, acceptance=acceptance)
    choice = tuning.choose(costs, values.margin)
    chosen = {"kind": "none"}
    if choice.draft_depth:
        chosen = specs[choice.num_nodes] | {"draft_depth": choice.draft_depth}
        if "num_nodes" not in chosen:
            chosen = base | {"draft_depth": choice.num_nodes - 1}
    facts = {"model": values.model, "scheme": values.scheme, "environment": environment.record()}
    tuning.write(output, spec=chosen, choice=choice, costs=costs, facts=facts)
    _print(costs, choice)
    print(f"drafter {json.dumps(chosen)} -> {output}")


def _sizes(values: flags.FlagValues) -> list[int]:
    try:
        sizes = sorted({int(size) for size in values.sizes})
    except ValueError:
        raise ConfigError(f"--sizes={','.join(values.sizes)}: whole numbers are needed") from None
    if not sizes or sizes[0] < 2:
        raise ConfigError(f"--sizes={','.join(values.sizes)}: a tree has at least 2 nodes")
    return sizes


def _sized(base: dict, size: int) -> dict:
    """The drafter's spec for trees of `size` nodes, as deep as that allows."""
    options = registry.options(base["kind"])
    depth = base.get("draft_depth", options.get("draft_depth"))
    if "num_nodes" in options:
        topk = min(base.get("topk", options["topk"]), size - 1)
        spec = base | {"num_nodes": size, "topk": topk, "draft_depth": min(depth, size - 1)}
        if size > _largest(spec):
            raise ConfigError(f"--sizes: {size} nodes do not fit into {depth} levels of {topk}")
        return spec
    if "draft_depth" in options:
        return base | {"draft_depth": size - 1}
    raise ConfigError(f"drafter {base['kind']!r} has neither num_nodes nor draft_depth to tune")


def _largest(spec: dict) -> int:
    """Nodes of the largest tree of this depth."""
    if "topk" not in spec:
        return spec["draft_depth"] + 1
    return 1 + spec["topk"] + (spec["draft_depth"] - 1) * spec["topk"] ** 2


def _times(
    model, spec: dict, rows: list[int], prompt: list[int], repeats: int
) -> tuple[dict[int, float], float]:
    """Milliseconds of the target's passes over so many rows, and of drafting, behind `prompt`."""
    drafter, module = model.drafter(spec), model.module
    state = step_times.prefilled(module, drafter, prompt, 1, max(rows, default=1))
    times = step_times.measure(module, drafter, state, rows, repeats, parts=("propose",))
    return {count: times[f"T({count})"] for count in rows}, times["propose"]


def _accepted(model, spec: dict, prompts, max_new_tokens: int) -> list[int]:
    """How many steps accepted 0, 1, 2, ... drafted tokens."""
    results = model.generate(prompts, model.drafter(spec), max_new_tokens=max_new_tokens)
    histograms = [result.metrics.acceptance_histogram for result in results]
    return np.sum(histograms, axis=0).tolist()


def _print(costs: tuning.Costs, choice: tuning.Prediction) -> None:
    table = Table(title="per tree size the best depth")
    for name in ("nodes", "verify ms", "of 1 row", "depth", "step ms", "tokens/step", "speed-up"):
        table.add_column(name, justify="right")
    best: dict[int, tuning.Prediction] = {}
    for prediction in tuning.predictions(costs):
        known = best.get(prediction.num_nodes)
        if known is None or prediction.speedup > known.speedup:
            best[prediction.num_nodes] = prediction
    for nodes, found in sorted(best.items()):
        verify = tuning.verify_ms(costs, nodes)
        cells = [nodes, f"{verify:.2f}", f"{verify / costs.verify_ms[1]:.2f}", found.draft_depth]
        cells += [f"{found.step_ms:.2f}", f"{found.acceptance_length:.2f}", f"{found.speedup:.2f}"]
        table.add_row(*map(str, cells), style="bold" if found == choice else None)
    contest.show(table)


if __name__ == "__main__":
    common.run(define_flags, main)
