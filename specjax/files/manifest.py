"""`specjax.json`, written last into every exported folder: what it is, what it came from, and which files it has."""

from pathlib import Path
from typing import Any

from specjax.errors import CheckpointError
from specjax.files import writer
from specjax.files.base import read_json

NAME = "specjax.json"
VERSION = 1


def write(folder: Path, **fields: Any) -> None:
    """Records `fields` (format, rotation, source) and the size in bytes of every file that is there already."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    writer.write_json(folder / NAME, {"manifest_version": VERSION, **fields, "files": sizes})


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder that specjax wrote; None if there is none.

    Raises:
        CheckpointError: of another version, or a weight file is missing or has another size than it was written with.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    manifest = read_json(path)
    version, files = manifest.get("manifest_version"), manifest.get("files")
    if version != VERSION or not isinstance(files, dict):
        raise CheckpointError(
            f"{path}: manifest_version={version!r} is not supported; supported: {VERSION}"
        )
    for name, size in files.items():
        file = folder / name
        if file.suffix == ".json" or (found := _size(file)) == size:
            continue
        what = "is missing" if found is None else f"has {found} bytes"
        raise CheckpointError(
            f"{file}: {what}, {NAME} says {size} bytes; the folder is incomplete, export or copy it again"
        )
    return manifest


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None
