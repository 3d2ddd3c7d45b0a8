"""Where does a decoding step's time go, and what does verifying n nodes cost against one?

    python -m experiments.step_times --model=smollm2-135m --drafter=ngram --output=steps.jsonl

After the first prompt of --prompts_file, every part of a step is compiled by itself and timed in turn: the draft, the
target's pass over the drafted tree, the whole step, and passes over trees of --sizes nodes. --output receives a row
with the parts ("record": "step_times"; "other" is what the step takes beyond draft and verification: accepting, moving
cache rows, the drafter's own bookkeeping) and one with the passes ("record": "verify_times"). Rows are appended;
`experiments.report` shows them.
"""

import dataclasses
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import evaluate
from experiments.shared import (
    common,
    environment,
    flag_groups,
    flags_drafter,
    flags_model,
    naming,
    preset,
    prompt_files,
    records,
)
from specjax import verify
from specjax.decoding import sampling, target
from specjax.decoding.tree import Tree
from specjax.drafters.base import Chunk
from specjax.engine import decode, engine
from specjax.errors import ConfigError

PARTS = ("propose", "verify", "step")
_PROMPTS = Path(__file__).parent / "presets" / "demo.jsonl"


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    preset.define_flags(values)
    flags_model.define(values, required=False)
    flags_drafter.define(values)
    string, integer = flags.DEFINE_string, flags.DEFINE_integer
    sizes = [str(size) for size in (1, 2, 4, 8, 16, 32, 64)]
    with flag_groups.heading(values, "Input"):
        string(
            "prompts_file", str(_PROMPTS), "JSON lines; the first one is used.", flag_values=values
        )
    with flag_groups.heading(values, "Measuring"):
        flags.DEFINE_list("sizes", sizes, "Numbers of nodes to verify.", flag_values=values)
        integer(
            "repeats", 9, "Timings of each part; medians count.", lower_bound=1, flag_values=values
        )
    with flag_groups.heading(values, "Output"):
        string("output", None, "JSON lines; rows are appended.", flag_values=values)
    with flag_groups.heading(values, "Execution"):
        integer("batch_size", 1, "Sequences that run together.", lower_bound=1, flag_values=values)
    flags.mark_flag_as_required("output", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Measures, writes, prints."""
    preset.apply(values)
    sizes = _sizes(values.sizes)
    spec = flags_drafter.spec(values)
    output = records.check_output(values.output, ".jsonl")
    prompts = prompt_files.read_prompts(values.prompts_file)[:1]
    weights = evaluate.describe_weights(values.model)
    weights += f" as {values.scheme}" if values.scheme else ""
    model = flags_model.load_model(values, [spec])
    [prompt] = prompt_files.encode(model, prompts, values.prompts_file)
    drafter = model.drafter(spec)
    state = prefilled(model.module, drafter, prompt, values.batch_size, max(sizes))
    with flags_model.profiled(values):
        times = measure(model.module, drafter, state, sizes, values.repeats)
    config = {
        **flags_model.model_config(values),
        "dtype": model.dtype_name,
        "weights": weights,
        "drafter": naming.full_spec(spec),
        "batch_size": values.batch_size,
        "prompt_tokens": len(prompt),
        "repeats": values.repeats,
        "backend": values.backend,
        "dequantize": flags_model.dequantize(values, [spec]),
        "environment": environment.record(),
    }
    rows = _rows(times, weights, spec, drafter.num_nodes, sizes)
    records.append_rows(output, [row | {"config": config} for row in rows])
    for name, value in times.items():
        print(f"{name:>12}  {value:8.2f} ms")
    print(f"-> {output}")


def _sizes(texts: list[str]) -> list[int]:
    if not texts or not all(text.isdigit() and int(text) > 0 for text in texts):
        raise ConfigError(f"--sizes={','.join(texts)}: whole numbers of at least 1 are needed")
    return sorted({1, *map(int, texts)})


def _rows(times: dict[str, float], weights, spec, num_nodes: int, sizes) -> list[dict[str, Any]]:
    parts = {f"{name}_ms": times[name] for name in PARTS}
    return [
        {
            "record": "step_times",
            "label": f"{weights}, {naming.short_label(spec)}",
            "num_nodes": num_nodes,
            **parts,
            # May be negative: parts are timed apart, and in a step one finds in the caches what another has read.
            "other_ms": times["step"] - times["propose"] - times["verify"],
        },
        {
            "record": "verify_times",
            "label": weights,
            "num_nodes": sizes,
            "verify_ms": [times[f"T({size})"] for size in sizes],
        },
    ]


def prefilled(module, drafter, prompt: list[int], batch: int, num_nodes: int) -> decode.DecodeState:
    """State of a batch after the same prompt, with room for trees of `num_nodes` nodes."""
    room = max(num_nodes, drafter.max_depth + 1 + drafter.scratch)
    width = engine.bucket(len(prompt))
    state = decode.init_state(module, drafter, batch, engine.cache_slots(width + room + 16), 16)
    tokens = np.zeros((batch, width + 1), np.int32)
    tokens[:, : len(prompt)] = prompt
    chunk = Chunk(
        tokens=jnp.asarray(tokens[:, :-1]),
        next_tokens=jnp.asarray(tokens[:, 1:]),
        start=jnp.zeros((batch,), jnp.int32),
        valid=jnp.full((batch,), len(prompt), jnp.int32),
        features=None,
    )
    never = jnp.asarray([-1], jnp.int32)
    state = dataclasses.replace(state, limit=jnp.full((batch,), 16, jnp.int32))
    return jax.jit(decode.prefill_chunk)(
        module, drafter, state, chunk, chunk.valid, never, sampling.sampling()
    )


def measure(
    module, drafter, state, sizes: list[int], repeats: int, parts: Sequence[str] = PARTS
) -> dict[str, float]:
    """Median milliseconds of the `parts` of a step, and of "T(n)" for every size.

    Args:
        parts: of "propose", "verify" (of the drafter's own tree) and "step".
    """
    greedy, acceptor = sampling.sampling(), verify.acceptor("lossless", True)
    never = jnp.asarray([-1], jnp.int32)

    def propose(models, state):
        module, drafter = models
        return drafter.propose(
            module, state.cache, state.draft, state.root, state.lengths, state.keys, greedy
        )

    def step(models, state):
        return decode.step(*models, state, never, greedy, acceptor)

    def scored(models, state, tree):
        module, drafter = models
        logits, features, cache, _ = target.forward_tree(
            module, tree, state.cache, state.lengths, drafter.needs
        )
        return sampling.most_likely(logits), features, cache

    # Weights are arguments: closed over, they would become constants of the program.
    models = (module, drafter)
    works: dict[str, tuple[Callable, tuple]] = {"propose": (propose, ()), "step": (step, ())}
    if "verify" in parts:
        works["verify"] = (scored, (jax.jit(propose)(models, state).tree,))
    works = {name: works[name] for name in PARTS if name in parts}
    works |= {f"T({size})": (scored, (_path(state.root, size),)) for size in sizes}
    return _medians(works, models, state, repeats)


def _medians(works: dict[str, tuple[Callable, tuple]], models, state, repeats: int):
    """Median milliseconds of functions of (models, state, ...), which take turns; the state is donated."""
    # Arrays are the arguments: taking modules apart at every call costs milliseconds that the loop does not have.
    leaves, structure = jax.tree.flatten(models)

    def program(work):
        def run(leaves, state, *arguments):
            return work(jax.tree.unflatten(structure, leaves), state, *arguments)

        return jax.jit(run, donate_argnums=1)

    programs = {name: program(work) for name, (work, _) in works.items()}
    taken: dict[str, list[float]] = {name: [] for name in works}
    bar = tqdm(total=(repeats + 1) * len(works), unit="run", disable=None)
    with bar, warnings.catch_warnings():
        # Small arrays of the state have no output that could take their place.
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        for repeat in range(repeats + 1):
            for name, (_, arguments) in works.items():
                # The copies that are donated are made before the clock starts, as the loop needs none; the first run
                # leaves the processor's caches as the loop finds them.
                for own in [jax.block_until_ready(jax.tree.map(jnp.copy, state)) for _ in range(2)]:
                    begin = time.perf_counter()
                    jax.block_until_ready(programs[name](leaves, own, *arguments))
                    spent = (time.perf_counter() - begin) * 1e3
                if repeat:  # the first one compiles
                    taken[name].append(spent)
                bar.update()
    return {name: float(np.median(values)) for name, values in taken.items()}


def _path(root, num_nodes: int) -> Tree:
    """A tree of `num_nodes` nodes, one below the other, without the promise that it is a chain."""
    batch = root.shape[0]
    parents = jnp.broadcast_to(jnp.arange(-1, num_nodes - 1, dtype=jnp.int32), (batch, num_nodes))
    tokens = jnp.broadcast_to(root[:, None], (batch, num_nodes))
    chain = num_nodes == 1
    return Tree(tokens=tokens, parents=parents, max_depth=num_nodes - 1, is_chain=chain)


if __name__ == "__main__":
    common.run(define_flags, main)
