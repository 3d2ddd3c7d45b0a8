"""What the training binaries share: flags of the text, the folder that belongs to one recipe, the curve."""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import records
from specjax.errors import ConfigError

# Flags of `define_text_flags` that decide what is trained on.
TEXT_RECIPE = ("text_file", "prompts_file", "max_length", "max_documents", "loss_on", "held_out")


def define_text_flags(values: flags.FlagValues) -> None:
    """Which text, and which of its tokens count."""
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    flags.DEFINE_multi_string(
        *("text_file", [], "Text to train on (.jsonl, .json, .txt); may be repeated."),
        flag_values=values,
    )
    string("prompts_file", None, "Prompts that the target answers first (as experiments.generate).")
    integer("max_new_tokens", 512, "Longest answer to a prompt.", lower_bound=8)
    flags.DEFINE_float("temperature", 0.7, "Of the answers.", lower_bound=0.0, flag_values=values)
    integer("batch_size", 8, "Prompts that are answered together.", lower_bound=1)
    integer("max_length", 1024, "Longer documents are cut.", lower_bound=8)
    flags.DEFINE_enum(
        *("loss_on", "response", ("all", "response"), "Which tokens count."), flag_values=values
    )
    integer("max_documents", None, "Take so many documents, chosen by the seed.", lower_bound=3)
    integer("held_out", 32, "Documents set aside for evaluation.", lower_bound=1)


def check_text(values: flags.FlagValues) -> None:
    """Raises FileNotFoundError for text that is not there."""
    for name in [*values.text_file, *([values.prompts_file] if values.prompts_file else [])]:
        if not Path(name).is_file():
            raise FileNotFoundError(f"{name}: no such file")


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


def recipe_facts(values: flags.FlagValues, recipe: Sequence[str]) -> dict[str, Any]:
    """The recipe for records; files by their names."""
    facts = {name: values[name].value for name in recipe}
    facts["text_file"] = [Path(name).name for name in values.text_file]
    facts["prompts_file"] = values.prompts_file and Path(values.prompts_file).name
    return facts


def digests(files: Sequence[Path]) -> dict[str, str]:
    """SHA-256 by name."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def read_curve(work: Path, step: int) -> list[dict[str, Any]]:
    """Evaluations of a run so far, up to the step of the checkpoint that it goes on from."""
    path = work / "curve.jsonl"
    rows = path.read_text().splitlines() if path.is_file() else []
    return [row for row in map(json.loads, rows) if row["step"] <= step]


def write_curve(work: Path, curve: Sequence[dict[str, Any]]) -> None:
    """Replaces the file of evaluations."""
    (work / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve))
