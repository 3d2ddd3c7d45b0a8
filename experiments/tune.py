"""Finds the draft tree that pays on this device, and whether any does.

    python -m experiments.tune --model=smollm2-135m --draft_checkpoint=HEAD --output=tuned.json
    python -m experiments.generate --model=smollm2-135m --tuned=tuned.json --prompt=...

Measures the target's pass over 1, 2, 4, ... rows, the time to draft trees of these sizes, and, by decoding the prompts
with each size, how many drafted tokens are accepted. From these the cost model of `specjax.tuning` chooses the number
of nodes and the depth, or no drafting at all. Works for drafters with `num_nodes` (EAGLE) and for chains.
"""

import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from experiments import common, environment, records
from specjax import cache as kv
from specjax import sampling, tuning
from specjax import target as passes
from specjax import tree as trees
from specjax.drafters import registry
from specjax.drafters.base import Chunk
from specjax.errors import ConfigError

_PROMPTS = Path(__file__).resolve().parent / "presets" / "demo.jsonl"


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    common.define_model_flags(values)
    common.define_drafter_flags(values, default="eagle")
    flags.DEFINE_list(
        "sizes", "2,3,4,6,8,12,16,32,60", "Nodes of the trees to try.", flag_values=values
    )
    flags.DEFINE_string("prompts_file", str(_PROMPTS), "Prompts to decode.", flag_values=values)
    flags.DEFINE_integer("limit", 8, "Prompts to take.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("max_new_tokens", 64, "Per prompt.", lower_bound=8, flag_values=values)
    flags.DEFINE_integer("repeats", 9, "Timed calls; the median counts.", flag_values=values)
    flags.DEFINE_float(
        "margin", 0.05, "Gain below which drafting stays off.", lower_bound=0.0, flag_values=values
    )
    flags.DEFINE_string("output", None, "JSON file for --tuned.", flag_values=values)
    flags.mark_flag_as_required("output", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Measures, chooses, writes, prints."""
    output = records.check_output(values.output, ".json")
    if values.tuned is not None:
        raise ConfigError("--tuned is what this binary makes; use --output")
    base = common.drafter_spec(values)
    sizes = _sizes(values)
    specs = {size: _sized(base, size) for size in sizes}
    prompts = records.read_prompts(values.prompts_file)[: values.limit]
    model = common.load_model(values, [base])
    encoded = records.encode(model, prompts, values.prompts_file, None)
    longest = max(encoded, key=len)
    verify_ms, propose_ms, acceptance = {}, {}, {}
    with tqdm(total=2 * len(sizes) + 1, unit="measurement") as bar:
        verify_ms[1] = _time_verify(model, longest, 1, values.repeats)
        bar.update()
        for size, spec in specs.items():
            verify_ms[size] = _time_verify(model, longest, size, values.repeats)
            depths = {1, spec["draft_depth"]}
            propose_ms[size] = {
                depth: _time_propose(model, spec | {"draft_depth": depth}, longest, values.repeats)
                for depth in sorted(depths)
                if size <= _largest(spec | {"draft_depth": depth})
            }
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


def _median_ms(call, repeats: int) -> float:
    """Median time of `call`, which takes and returns what it carries from one call to the next."""
    carried = jax.block_until_ready(call(None))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        carried = jax.block_until_ready(call(carried))
        times.append((time.perf_counter() - begin) * 1e3)
    return float(np.median(times))


def _prefilled(model, tokens: list[int], needs):
    """Cache, first token and features after the target's pass over `tokens`, with room for a tree."""
    module = model.module
    ids = jnp.asarray([tokens], jnp.int32)
    cache = kv.init(module.config, 1, len(tokens) + 256, module.dtype)
    run = jax.jit(passes.forward_chunk, static_argnames="needs")
    out, features = run(module, ids, jnp.zeros((1,), jnp.int32), cache, needs)
    root = jnp.argmax(module.logits(out.hidden[:, -1]), axis=-1).astype(jnp.int32)
    return ids, out.cache, root, features


def _time_verify(model, tokens: list[int], size: int, repeats: int) -> float:
    """Time of the target's pass over a tree of `size` nodes behind `tokens`."""
    _, cache, root, _ = _prefilled(model, tokens, None)
    lengths = jnp.full((1,), len(tokens), jnp.int32)
    tree = trees.chain(root, jnp.zeros((1, size - 1), jnp.int32))

    def verify(module, cache):
        logits, _, cache, _ = passes.forward_tree(module, tree, cache, lengths, None)
        return jnp.argmax(logits, axis=-1), cache

    run = jax.jit(verify, donate_argnames="cache")
    return _median_ms(
        lambda carried: run(model.module, cache if carried is None else carried[1]), repeats
    )


def _time_propose(model, spec: dict, tokens: list[int], repeats: int) -> float:
    """Time of drafting behind `tokens`."""
    drafter, module = model.drafter(spec), model.module
    ids, cache, root, features = _prefilled(model, tokens, drafter.needs)
    lengths = jnp.full((1,), len(tokens), jnp.int32)
    chunk = Chunk(
        tokens=ids,
        next_tokens=jnp.roll(ids, -1, axis=1),
        start=jnp.zeros((1,), jnp.int32),
        valid=lengths,
        features=features,
    )
    state = drafter.init(module, 1, len(tokens) + 256)
    state = jax.jit(lambda d, m, s, c: d.prefill(m, s, c))(drafter, module, state, chunk)
    keys = jnp.zeros((1, 2), jnp.uint32)

    @jax.jit
    def propose(drafter, module, cache, state):
        proposal = drafter.propose(module, cache, state, root, lengths, keys, sampling.sampling())
        return proposal.tree

    return _median_ms(lambda _: propose(drafter, module, cache, state), repeats)


def _accepted(model, spec: dict, prompts, max_new_tokens: int) -> list[int]:
    """How many steps accepted 0, 1, 2, ... drafted tokens."""
    results = model.generate(prompts, model.drafter(spec), max_new_tokens=max_new_tokens)
    histograms = [result.metrics.acceptance_histogram for result in results]
    return np.sum(histograms, axis=0).tolist()


def _print(costs: tuning.Costs, choice: tuning.Prediction) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 110
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
    console.print(table)


if __name__ == "__main__":
    common.run(define_flags, main)
