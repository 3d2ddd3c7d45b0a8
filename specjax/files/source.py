"""The weights of a folder, whatever its files are: one file, shards with an index, zip pickles, Orbax."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from specjax.errors import CheckpointError
from specjax.files import base, find, orbax_store, pickle
from specjax.files.safetensors_file import SafetensorsFile

_log = logging.getLogger(__name__)


class RecordedSource:
    """A source that remembers which of its tensors were read."""

    def __init__(self, source: base.TensorSource):
        self._source = source
        self._read: set[str] = set()

    def names(self) -> Sequence[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._source.dtype(name)

    def read(self, name: str) -> np.ndarray:
        self._read.add(name)
        return self._source.read(name)

    def check_held(self, needed: Callable[[str], bool]) -> None:
        """Raises CheckpointError for the first tensor that an index states, no file holds, and is `needed`."""
        for name in getattr(self._source, "absent", ()):
            if needed(name):
                self._source.shape(name)  # raises, with the file

    def forget(self) -> None:
        """Lets nothing count as read: what was read so far was only looked at."""
        self._read.clear()

    def unread(self) -> tuple[str, ...]:
        """Names of tensors that nobody has read, in the files' order."""
        return tuple(name for name in self.names() if name not in self._read)


class ShardedSource:
    """Several files as one source; nothing else in their folder is looked at.

    Args:
        path: the index or folder, for messages.
        shards: the opened files by name.
        stated: which file an index puts a tensor in; it decides where several have it. A tensor that none has is an
            error only when it is read: indices keep names that nobody needs.

    Attributes:
        absent: tensors that the index puts in a file and no file holds.

    Raises:
        CheckpointError: two files have a tensor, and nothing says which one is meant.
    """

    def __init__(
        self, path: Path, shards: Mapping[str, base.TensorSource], stated: Mapping[str, str]
    ):
        self.path = path
        self._stated = stated
        held: dict[str, list[str]] = {name: [] for name in stated}
        for file, shard in shards.items():
            for name in shard.names():
                held.setdefault(name, []).append(file)
        self._files = {
            name: shards[self._chosen(name, files)] for name, files in held.items() if files
        }
        self.absent = tuple(name for name, files in held.items() if not files)
        if self.absent:
            _log.warning(
                "%s names %d tensors that no file holds (%s)",
                *(path, len(self.absent), _some(self.absent)),
            )

    def names(self) -> Sequence[str]:
        return tuple(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file(name).shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._file(name).dtype(name)

    def read(self, name: str) -> np.ndarray:
        return self._file(name).read(name)

    def _chosen(self, name: str, files: list[str]) -> str:
        if self._stated.get(name) in files:
            return self._stated[name]
        if len(files) > 1:
            raise CheckpointError(f"{self.path}: {name} is in {' and in '.join(files)}")
        return files[0]

    def _file(self, name: str) -> base.TensorSource:
        if name in self._files:
            return self._files[name]
        if name in self._stated:
            file = self.path.parent / self._stated[name]
            if not file.is_file():
                raise CheckpointError(
                    f"shard {file.name} is missing: {self.path} puts {name} there"
                )
            raise CheckpointError(f"{name} is missing from {file} ({self.path.name})")
        raise CheckpointError(f"{name} is missing from {self.path}")


def open_index(index: Path) -> ShardedSource:
    """Opens the files listed in an index {"weight_map": {tensor: file}}.

    Raises:
        CheckpointError: the index is malformed, or a file that it lists. One that is missing is an error where a tensor
            of it is read.
    """
    weight_map = base.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    shards: dict[str, base.TensorSource] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
            raise CheckpointError(
                f"{index}: weight_map[{name}] = {file!r} is not a file name inside its folder"
            )
        if file not in shards and (index.parent / file).is_file():
            shards[file] = open_file(index.parent / file)
    return ShardedSource(index, shards, weight_map)


def open_source(directory: Path, names: Sequence[str] = find.STANDARD_NAMES) -> RecordedSource:
    """Opens a folder's Orbax checkpoint, or the weights that `specjax.files.find` finds in it.

    Raises:
        FileNotFoundError: there are none.
        CheckpointError: several could be meant, or the ones that are there are malformed or incomplete.
    """
    return RecordedSource(_open(directory, names))


def _open(directory: Path, names: Sequence[str]) -> base.TensorSource:
    if (directory / "orbax").is_dir():
        return orbax_store.OrbaxSource(directory / orbax_store.FOLDER)
    files = [file.name for file in directory.iterdir() if file.is_file()]
    found = find.weight_files(files, str(directory), names, find.stated_name(directory))
    if len(found) > 1:
        shards = {name: open_file(directory / name) for name in found}
        return ShardedSource(directory, shards, {})
    opened = open_file(directory / found[0])
    if found[0] == find.MISTRAL and not any("model." in name for name in opened.names()):
        raise FileNotFoundError(
            f"no weights in {directory} but {found[0]}, whose tensors ({_some(opened.names())}) have names of "
            "Mistral's own layout: get the files for transformers (model.safetensors)"
        )
    return opened


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def open_file(path: Path) -> base.TensorSource:
    """Opens a weight file by its suffix: .safetensors, .bin / .pt / .pth (zip pickle), or
    .index.json.

    Raises:
        FileNotFoundError: the file does not exist.
        CheckpointError: it is malformed, or its suffix is none of these.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.name.endswith(".index.json"):
        return open_index(path)
    match path.suffix:
        case ".safetensors":
            return SafetensorsFile(path)
        case ".bin" | ".pt" | ".pth":
            return pickle.TorchFile(path)
    raise CheckpointError(
        f"{path}: unknown kind of weight file (.safetensors, .bin, .pt, .pth or .index.json)"
    )
