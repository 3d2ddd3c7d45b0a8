"""What the training binaries share: text and its flags, the folder that belongs to one recipe, progress and curve."""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from experiments.shared import environment, flag_groups, records
from specjax.config import DTYPES
from specjax.errors import ConfigError

# Flags of `define_text_flags` that decide what is trained on.
TEXT_RECIPE = ("text_file", "prompts_file", "max_length", "max_documents", "loss_on", "held_out")


def define_text_flags(values: flags.FlagValues) -> None:
    """Which text, and which of its tokens count."""
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    with flag_groups.heading(values, "Input"):
        flags.DEFINE_multi_string(
            *("text_file", [], "Text to train on (.jsonl, .json, .txt); may be repeated."),
            flag_values=values,
        )
        string(
            "prompts_file", None, "Prompts that the target answers first (as experiments.generate)."
        )
        integer("max_length", 1024, "Longer documents are cut.", lower_bound=8)
        integer("max_documents", None, "Take so many documents, chosen by the seed.", lower_bound=3)
        flags.DEFINE_enum(
            *("loss_on", "response", ("all", "response"), "Which tokens count."), flag_values=values
        )
        integer("held_out", 32, "Documents set aside for evaluation.", lower_bound=1)
    with flag_groups.heading(values, "Sampling"):
        integer("max_new_tokens", 512, "Longest answer to a prompt.", lower_bound=8)
        flags.DEFINE_float(
            "temperature", 0.7, "Of the answers.", lower_bound=0.0, flag_values=values
        )
    with flag_groups.heading(values, "Execution"):
        integer("batch_size", 8, "Prompts that are answered together.", lower_bound=1)


def define_run_flags(values: flags.FlagValues, *, weight_decay: float, clip_norm: float) -> None:
    """Which model, where to, and how long and how the optimizer works on it; the defaults that differ are given."""
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    number = functools.partial(flags.DEFINE_float, flag_values=values)
    with flag_groups.heading(values, "Model"):
        string("model", None, "The target: checkpoint folder, .gguf file, model name or hub id.")
        flags.DEFINE_enum(
            "dtype",
            None,
            DTYPES,
            "Compute dtype; what is trained stays float32. Default: float32 on CPUs, else what the checkpoint states.",
            flag_values=values,
        )
    with flag_groups.heading(values, "Training"):
        integer("total_steps", 2000, "Optimizer steps.", lower_bound=1)
        integer("tokens_per_batch", 4096, "Padding included.", lower_bound=128)
        integer("save_every", 200, "Steps between checkpoints.", lower_bound=1)
        integer("warmup_steps", 100, "Linear warm-up.", lower_bound=0)
        number("weight_decay", weight_decay, "AdamW's.", lower_bound=0.0)
        number("clip_norm", clip_norm, "Bound of the gradient's norm.", lower_bound=0.0)
        integer("seed", 0, "Of initial values, order and noise.")
    with flag_groups.heading(values, "Output"):
        string("output", None, "Folder for the result; replaced after each checkpoint.")
        string("work_dir", None, "Folder for what resumes. Default: OUTPUT with '.work' behind.")
        flags.DEFINE_boolean(
            "overwrite", False, "Replace --output of another run.", flag_values=values
        )
    flags.mark_flags_as_required(["model", "output"], flag_values=values)


def check_text(values: flags.FlagValues) -> None:
    """Raises FileNotFoundError for text that is not there."""
    for name in [*values.text_file, *([values.prompts_file] if values.prompts_file else [])]:
        if not Path(name).is_file():
            raise FileNotFoundError(f"{name}: no such file")


def read_text(values: flags.FlagValues, tokenizer, answers: Path | None) -> list:
    """Examples of --text_file and of the target's answers, if there are any."""
    from specjax.training import text

    limits = {"max_length": values.max_length, "loss_on": values.loss_on}
    files = [Path(name) for name in values.text_file]
    examples = [e for file in files for e in text.read(file, tokenizer, **limits)]
    return examples + (text.read_answers(answers, **limits) if answers else [])


def claim(values: flags.FlagValues, recipe: Sequence[str]) -> tuple[Path, Path]:
    """Makes --work_dir (default: beside --output) this run's, or finds that it is; returns (work folder, output).

    Args:
        recipe: flags that must be the same when a run goes on.
    Raises:
        ConfigError: the work folder belongs to other flags, or the output exists.
    """
    output, work = Path(values.output), Path(values.work_dir or f"{values.output}.work")
    present = {name: values[name].value for name in recipe}
    marker = work / "recipe.json"
    if marker.is_file():
        known = json.loads(marker.read_text())
        for name, value in present.items():
            if known.get(name) != value:
                raise ConfigError(
                    f"{work} belongs to a run with --{name}={known.get(name)!r}, not {value!r}; "
                    "use its flags, or another --work_dir"
                )
        return work, output
    if output.exists() and any(output.iterdir()) and not values.overwrite:
        raise ConfigError(f"{output} exists; choose another --output or pass --overwrite")
    work.mkdir(parents=True, exist_ok=True)
    with records.atomic(marker) as temporary:
        temporary.write_text(json.dumps(present, indent=1))
    return work, output


def facts(values: flags.FlagValues, recipe: Sequence[str], examples, curve) -> dict[str, Any]:
    """What training.json tells of a run; files by their names."""
    told = {name: values[name].value for name in recipe}
    told["text_file"] = [Path(name).name for name in values.text_file]
    told["prompts_file"] = values.prompts_file and Path(values.prompts_file).name
    return {
        "recipe": told,
        "documents": len(examples),
        "tokens": sum(len(example.tokens) for example in examples),
        "curve": curve,
        "environment": environment.record(),
    }


def settings(values: flags.FlagValues, **others):
    """`specjax.training.loop.Settings` from the flags that the binaries have in common, and `others`."""
    from specjax.training import loop

    common = ("total_steps", "warmup_steps", "weight_decay", "clip_norm", "seed", "save_every")
    return loop.Settings(**{name: values[name].value for name in common}, **others)


def digests(files: Sequence[Path]) -> dict[str, str]:
    """SHA-256 by name."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def train(
    trainer,
    work: Path,
    run: Callable[[Callable, Callable], None],
    evaluate: Callable[[], Any],
    summary: Callable[[Any], dict[str, Any]],
    shown: Callable[[dict[str, Any]], dict[str, float]],
    export: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Trains with a progress bar; after each checkpoint evaluates, adds to the curve and exports.

    Args:
        run: `trainer.run` with everything but its two callbacks.
        evaluate: measurements over held-out examples.
        summary: of measurements.
        shown: of a summary, what the bar shows beside the loss.
        export: given the curve so far.
    Returns:
        the curve, its part of an earlier session included.
    """
    total = trainer.settings.total_steps
    curve, last = _read_curve(work, trainer.step), {}

    def report(step, epoch, measured):
        last.update(measured, epoch=epoch)
        bar.update()
        if step % 10 == 0:
            found = shown(summary(measured)) | {"loss": float(measured["loss"])}
            bar.set_postfix({name: f"{value:.3f}" for name, value in found.items()})

    def saved():
        row = {"step": trainer.step, "epoch": last["epoch"], "loss": float(last["loss"])}
        row |= {"train": summary(last), "held_out": summary(evaluate())}
        curve.append(row)
        with records.atomic(work / "curve.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in curve))
        tqdm.write(json.dumps(row))
        export(curve)

    with tqdm(total=total, initial=trainer.step, unit="step", desc="training") as bar:
        run(report, saved)
    return curve


def _read_curve(work: Path, step: int) -> list[dict[str, Any]]:
    """Evaluations of a run so far, up to the step of the checkpoint that it goes on from."""
    path = work / "curve.jsonl"
    rows = path.read_text().splitlines() if path.is_file() else []
    return [row for row in map(json.loads, rows) if row["step"] <= step]
