"""GGUF models in several files, `<name>-00001-of-0000N.gguf` as llama-gguf-split writes them, seen as one.

The first part has the model's metadata; every part says with `split.no` and `split.count` which one it is, and
`split.tensors.count` how many tensors all of them hold.
"""

import logging
import re
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from specjax.checkpoints.gguf_file import GGUFFile, TensorInfo
from specjax.errors import CheckpointError

_PART = re.compile(r"(?P<stem>.*)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)

_log = logging.getLogger(__name__)


class GGUFParts:
    """The parts of a split model with the methods of `GGUFFile`.

    Attributes:
        path: the part that was asked for.
        metadata: of the first part.
    """

    def __init__(self, path: Path, parts: list[GGUFFile]):
        self.path = path
        self.metadata = parts[0].metadata
        self._parts: dict[str, GGUFFile] = {}
        for part in parts:
            for name in part.names():
                if name in self._parts:
                    raise CheckpointError(
                        f"{part.path}: tensor {name} is in {self._parts[name].path.name} too"
                    )
                self._parts[name] = part

    def names(self) -> tuple[str, ...]:
        return tuple(self._parts)

    def info(self, name: str) -> TensorInfo:
        if name not in self._parts:
            raise CheckpointError(f"{name} is missing from {self.path} and its other parts")
        return self._parts[name].info(name)

    def rows(self, name: str) -> UInt8[np.ndarray, "rows row_bytes"]:
        """As `GGUFFile.rows`."""
        self.info(name)
        return self._parts[name].rows(name)

    def unread(self) -> tuple[str, ...]:
        """As `GGUFFile.unread`."""
        return tuple(name for part in set(self._parts.values()) for name in part.unread())


def open_parts(path: Path) -> GGUFFile | GGUFParts:
    """Opens a .gguf file, and the other parts of its model if it is one of several.

    Raises:
        CheckpointError: a part is missing that holds tensors, or belongs to another model; or a file is malformed.
    """
    file = GGUFFile(path)
    count = file.metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return file
    match = _PART.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise CheckpointError(
            f"{path}: split.count = {count}, so its name must end in -00001-of-{count:05d}.gguf for the other parts "
            "to be found; give the files their names back"
        )
    names = [f"{match['stem']}-{index + 1:05d}-of-{count:05d}.gguf" for index in range(count)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    parts = [GGUFFile(path.parent / name) for name in names if name not in missing]
    _check_order(parts, names, count)
    if names[0] in missing:
        raise CheckpointError(f"{path.parent / names[0]} is missing: it has the model's metadata")
    return _complete(GGUFParts(path, parts), missing)


def _check_order(parts: list[GGUFFile], names: list[str], count: int) -> None:
    """Every part says that it is the one whose name it has."""
    for part in parts:
        index = names.index(part.path.name)
        found = part.metadata.get("split.no"), part.metadata.get("split.count")
        if found != (index, count):
            raise CheckpointError(
                f"{part.path}: split.no = {found[0]!r} and split.count = {found[1]!r}, expected {index} and {count} "
                "by its name; it is not this part"
            )


def _complete(model: GGUFParts, missing: list[str]) -> GGUFParts:
    """Refuses a model whose parts lack tensors: the first part states their number."""
    stated, found = model.metadata.get("split.tensors.count"), len(model.names())
    if stated == found and missing:
        _log.warning("%s: %s missing, but no tensor is", model.path, ", ".join(missing))
    elif missing:
        raise CheckpointError(
            f"{model.path} is one of {model.metadata['split.count']} parts, and these are missing beside it: "
            f"{', '.join(missing)}; download them too"
        )
    elif stated is not None and stated != found:
        raise CheckpointError(
            f"{model.path}: split.tensors.count = {stated!r}, but its parts hold {found} tensors; download them again"
        )
    return model
