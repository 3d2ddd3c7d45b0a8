"""Named configurations: files of experiments/presets whose flags a binary takes over where the user gives none.

A file has "presets" (name -> flags) and "grids", of which every combination of one entry per axis is a preset: its name
joins theirs by "-", its flags are theirs together.
"""

import functools
import itertools
import json
from pathlib import Path
from typing import Any

from absl import flags

from experiments.shared import flag_groups, flags_drafter
from specjax.errors import ConfigError

_FOLDER = Path(__file__).parents[1] / "presets"
_FILES = ("specmquant.json", "qspec.json", "smollm2.json", "spadec.json")


def define_flags(values: flags.FlagValues) -> None:
    """--preset."""
    with flag_groups.heading(values, "Preset"):
        flags.DEFINE_string(
            "preset",
            None,
            "Named configuration; flags given beside it win. --preset=list prints the names.",
            flag_values=values,
        )


def apply(values: flags.FlagValues, needs_model: bool = True) -> None:
    """Gives the flags of --preset their values where they were not given on the command line.

    Flags of a preset that the binary does not have are not for it and stay out.

    Raises:
        ConfigError: there is no such preset; or no --model after all, and `needs_model`.
    """
    if values.preset == "list":
        print("\n".join(presets()))
        raise SystemExit(0)
    if values.preset is not None:
        settings = lookup(values.preset)
        other_drafter = "drafter" in values and values["drafter"].present
        for name, value in settings.items():
            if name in values and not (other_drafter and name in flags_drafter.DRAFTER_FLAGS):
                values.set_default(name, json.dumps(value) if isinstance(value, dict) else value)
    if needs_model and values.model is None:
        raise ConfigError(
            "--model is needed: a checkpoint directory, a .gguf file, smollm2-135m, or a hub id org/name"
        )


def lookup(name: str) -> dict[str, Any]:
    """Flags of a preset.

    Raises:
        ConfigError: there is none of that name; similar ones are named.
    """
    known = presets()
    if name not in known:
        words = name.split("-")
        close = sorted(known, key=lambda other: -sum(word in other.split("-") for word in words))
        raise ConfigError(
            f"--preset={name!r}: there is none; near it: {', '.join(close[:6])}; "
            "--preset=list prints all names"
        )
    return known[name]


@functools.cache
def presets() -> dict[str, dict[str, Any]]:
    """All presets by name."""
    found: dict[str, dict[str, Any]] = {}
    for file in _FILES:
        content = json.loads((_FOLDER / file).read_text(encoding="utf-8"))
        for grid in content.get("grids", []):
            found |= _expand(grid)
        found |= content.get("presets", {})
    return found


def _expand(grid: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The combinations of a grid's axes."""
    found = {}
    for combination in itertools.product(*(axis.items() for axis in grid.values())):
        settings: dict[str, Any] = {}
        for _, entry in combination:
            settings |= entry
        found["-".join(name for name, _ in combination)] = settings
    return found
