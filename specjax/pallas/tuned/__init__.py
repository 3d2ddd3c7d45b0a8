"""Measured tiles as data: `<device kind>/<op>.json`, written by the kernel benchmark.

A file maps a weight to its tiles:

    {"4096x14336g128": {"splits": 4, "rows": {"8": {"tiles_per_step": 4, "num_stages": 5}}}}

The key is outputs x inputs and the group size (0 per channel); "rows" holds row tiles of the
kernel. Splits are the weight's alone, so that a token is rounded alike in blocks of any size.
"""

import functools
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from specjax import errors


def folder_name(device_kind: str) -> str:
    """The folder of a device: its name in lower case with underscores."""
    return device_kind.lower().replace(" ", "_").replace("/", "_")


def weight_key(out_features: int, in_features: int, table_group: int) -> str:
    """The key of a weight in a table."""
    return f"{out_features}x{in_features}g{table_group}"


@functools.cache
def table(op: str, device_kind: str) -> dict:
    """The tuned tiles of `op` on a device; empty where none were measured.

    Raises:
        ConfigError: the file is not such a table.
    """
    path = resources.files(__package__) / folder_name(device_kind) / f"{op}.json"
    if not path.is_file():
        return {}
    return parse(path.read_text(), str(path))


def parse(text: str, name: str) -> dict:
    """A table from the text of a file called `name`.

    Raises:
        ConfigError: the text is not such a table; the message names the entry.
    """
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise errors.ConfigError(f"{name} is not JSON: {error}") from error
    for key, entry in entries.items():
        values = [entry.get("splits")] if isinstance(entry, dict) else [None]
        rows = entry.get("rows", {}) if isinstance(entry, dict) else {}
        for tile in rows.values():
            values += [tile.get("tiles_per_step"), tile.get("num_stages")]
        if not rows or any(not isinstance(value, int) or value < 1 for value in values):
            raise errors.ConfigError(
                f"{name}: entry {key!r} needs positive integers splits and, for every row tile, "
                f"tiles_per_step and num_stages; found {entry!r}"
            )
    return entries


@functools.cache
def parsed(text: str) -> dict:
    """A table from a text that was measured on this machine, read once."""
    return parse(text, "the tuned tiles of this machine")


def tables_in(folder: Path, device_kind: str) -> tuple[tuple[str, str], ...]:
    """Pairs of op and text of the tables in a folder that is laid out as this one.

    Raises:
        ConfigError: one of them is damaged.
    """
    texts = {
        path.stem: path.read_text()
        for path in sorted((folder / folder_name(device_kind)).glob("*.json"))
    }
    for op, text in texts.items():
        parse(text, f"{folder}/{folder_name(device_kind)}/{op}.json")
    return tuple(texts.items())


def paths() -> Iterator[Path]:
    """The tables in the package."""
    yield from sorted(Path(__file__).parent.glob("*/*.json"))
