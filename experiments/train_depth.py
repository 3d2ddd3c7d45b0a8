"""Trains token-adaptive depth (D-LLM): routers that let tokens skip layers, and low-rank updates of q, k and v.

    python -m experiments.train_depth --model=DENSE --text_file=text.jsonl --output=ROUTED
    python -m experiments.train_depth --model=DIR --prompts_file=prompts.jsonl --router_bits=none --output=ROUTED

The base stays frozen. The work folder (default: beside the output) holds Orbax checkpoints of adapter and optimizer,
the answers to --prompts_file, and the curve; interrupted at any point and started again with the same flags, the run
goes on. After each checkpoint the held-out documents are evaluated with the decisions of inference, the updates are
merged, and the routed model is written to --output as a Hugging Face folder whose config.json has dynamic_* keys
(`specjax.load` reads it), with recipe and curve in its training.json.
"""

import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

import specjax
from experiments.shared import common, flag_groups, own_text, training_runs
from specjax import checkpoints, config, conversion
from specjax.checkpoints import export
from specjax.config.depth import DepthConfig
from specjax.errors import ConfigError
from specjax.files import hub, writer
from specjax.models import llama
from specjax.models.llama import Llama
from specjax.quant import rotation
from specjax.text import tokenizer
from specjax.training.depth import adapter as adapters

_ROUTERS = ("target_rate", "router_bits", "router_width", "start_layer", "reserved_tokens")
# Flags that belong to the recipe: a work folder made with other values is refused.
_RECIPE = (
    *("model", "seed", *training_runs.TEXT_RECIPE, *_ROUTERS, "rate_weight", "lora_rank"),
    *("dropout", "total_steps", "tokens_per_batch", "learning_rate", "warmup_steps"),
    *("weight_decay", "clip_norm"),
)


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    number = functools.partial(flags.DEFINE_float, flag_values=values)
    choice = functools.partial(flags.DEFINE_enum, flag_values=values)
    training_runs.define_run_flags(values, weight_decay=0.02, clip_norm=1.0)
    training_runs.define_text_flags(values)
    with flag_groups.heading(values, "Training"):
        number("target_rate", 0.5, "Share of the layers that a token shall run through.")
        number(
            "rate_weight", 5.0, "Final weight of the distance from --target_rate.", lower_bound=0.0
        )
        number("learning_rate", 1e-3, "Peak.", lower_bound=0.0)
        integer("lora_rank", 8, "Rank of the updates of q, k and v.", lower_bound=1)
        number("dropout", 0.05, "Of the updates' outputs.", lower_bound=0.0, upper_bound=0.9)
        choice(
            "router_bits",
            "4",
            ("none", "4", "8"),
            "Codes that routers see; none: the state itself.",
        )
        integer("router_width", 512, "Hidden units of a router.", lower_bound=1)
        integer("start_layer", 2, "First layer that can be skipped.", lower_bound=0)
        integer("reserved_tokens", 2, "First tokens that run through all layers.", lower_bound=0)
    with flag_groups.heading(values, "Output"):
        choice("export_dtype", None, config.DTYPES, "Of the written weights. Default: the base's.")


def main(values: flags.FlagValues) -> None:
    """Trains up to --total_steps."""
    if not values.text_file and values.prompts_file is None:
        raise ConfigError("give --text_file or --prompts_file")
    training_runs.check_text(values)
    depth = _depth(values)
    work, output = training_runs.claim(values, _RECIPE)
    base = _Base(values)
    run = _Run(values, base, depth, work, output)
    run.train()
    print(json.dumps({"dense": run.dense, **(run.curve[-1] if run.curve else {})}, indent=1))


def _depth(values: flags.FlagValues) -> DepthConfig:
    bits = values.router_bits
    fields = {name: values[name].value for name in _ROUTERS if name != "router_bits"}
    return DepthConfig(code_bits=None if bits == "none" else int(bits), **fields)


class _Base:
    """The model that is trained, in canonical form, and where it came from."""

    def __init__(self, values: flags.FlagValues):
        self.path = hub.resolve(values.model)
        checkpoint = checkpoints.open_checkpoint(self.path)
        if checkpoint.config.depth is not None:
            raise ConfigError(f"{values.model} has routers already; start from its base")
        if self.path.is_dir() and rotation.find(self.path) is not None:
            raise ConfigError(
                f"{values.model} is rotated; train what it was made from, then convert the result"
            )
        self.tokenizer = tokenizer.load(self.path, checkpoint)
        if self.tokenizer is None:
            raise ConfigError(f"{values.model} has no tokenizer files, which the text needs")
        stored = checkpoint.config.dtype
        on_cpu = jax.default_backend() == "cpu"
        dtype = values.dtype or ("float32" if on_cpu else stored)
        self.module = llama.build(checkpoint, jnp.dtype(dtype))
        adapters.check_base(self.module)
        self.export_dtype = values.export_dtype or stored


class _Run:
    """One training run: text, trainer, curve."""

    def __init__(self, values, base: _Base, depth: DepthConfig, work: Path, output: Path):
        from specjax.training import batches, text

        self._values, self._base, self._work, self._output = values, base, work, output
        self._depth = depth
        answers = None
        if values.prompts_file:
            model = specjax.load(values.model)
            answers = own_text.answers(values, model, Path(values.prompts_file), work)
        examples = training_runs.read_text(values, base.tokenizer, answers)
        self._examples, self._held_out = text.split(
            examples, values.held_out, values.seed, values.max_documents
        )
        self._plans = [
            batches.plan([len(e.tokens) for e in rows], values.tokens_per_batch)
            for rows in (self._examples, self._held_out)
        ]
        self.curve, self.dense = [], self._evaluate_dense()

    def _evaluate_dense(self) -> dict[str, float]:
        """Held-out perplexity of the base with all its layers."""
        from specjax.training.depth import training

        total = None
        for width, rows in self._plans[1]:
            sums = training.dense(self._base.module, training.load(self._held_out, width, rows))
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        return training.summary(total)

    def train(self) -> None:
        """Trains, evaluates and exports."""
        from specjax.training.depth import training

        values, target = self._values, self._base.module
        key = jax.random.key(values.seed)
        adapter = adapters.init(key, target.config, self._depth, values.lora_rank)
        weights = training.Weights(rate=values.rate_weight, dropout=values.dropout)
        trainer = training.Trainer(adapter, weights, _settings(values), self._work / "checkpoints")
        plan, held_out_plan = self._plans
        self.curve = training_runs.train(
            trainer,
            self._work,
            run=lambda *callbacks: trainer.run(
                target, None, self._examples, None, plan, *callbacks
            ),
            evaluate=lambda: trainer.evaluate(target, None, self._held_out, None, held_out_plan),
            summary=training.summary,
            shown=lambda measured: {"executed": measured["executed"]},
            export=lambda curve: self._export(trainer.head(), curve),
        )

    def _export(self, adapter: adapters.Adapter, curve) -> None:
        facts = training_runs.facts(self._values, _RECIPE, self._examples, curve)
        module = adapters.routed(self._base.module, adapter)
        write(module, self._output, self._base, facts | {"dense": self.dense})


def write(module: Llama, output: Path, base: _Base, facts: dict) -> None:
    """The routed model with the base's tokenizer files and `facts`; the folder appears whole or not at all."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        conversion.copy_side_files(base.path, base.tokenizer, folder)
        writer.write_json(folder / "training.json", facts)
        export.export(
            *(module, dataclasses.replace(module.config, dtype=base.export_dtype), output),
            format=export.DENSE,
            dtype=base.export_dtype,
            extra_files=sorted(folder.iterdir()),
            source=base.path.name,
            overwrite=True,
        )


def _settings(values: flags.FlagValues):
    return training_runs.settings(
        values, learning_rate=values.learning_rate, feature_noise=0.0, final_rate=0.0
    )


if __name__ == "__main__":
    common.run(define_flags, main)
