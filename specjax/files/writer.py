"""Writing tensors to safetensors shards one at a time, and folders that appear whole or not at all."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Shaped

from specjax.errors import CheckpointError
from specjax.files import safetensors_file

_TAGS = {dtype: tag for tag, dtype in safetensors_file.DTYPES.items()}
_INDEX = "model.safetensors.index.json"


class ShardWriter:
    """Streams tensors into `model.safetensors`, or into numbered shards with an index.

    Nothing but the tensor at hand is in memory: the header, which comes first in the file, is written last into space
    kept free for it (the format allows trailing blanks in a header).

    Args:
        directory: where the files go.
        shard_bytes: a shard is closed before it would exceed this many bytes of tensors.
        header_bytes: space kept for the header of each shard; `header_space` gives an upper bound.
    """

    def __init__(self, directory: Path, *, shard_bytes: int, header_bytes: int):
        self._directory = directory
        self._shard_bytes = shard_bytes
        self._header_bytes = -(-header_bytes // 8) * 8
        self._shards: list[list[str]] = []
        self._stream: BinaryIO | None = None
        self._entries: dict[str, dict] = {}
        self._offset = 0
        self.total_bytes = 0

    def add(self, name: str, array: Shaped[np.ndarray, "..."]) -> None:
        """Appends one tensor.

        Raises:
            CheckpointError: its dtype has no tag in the format.
        """
        if array.dtype not in _TAGS:
            raise CheckpointError(f"{name}: dtype {array.dtype} cannot be stored in safetensors")
        if self._stream is None or (
            self._entries and self._offset + array.nbytes > self._shard_bytes
        ):
            self._open()
        end = self._offset + array.nbytes
        self._entries[name] = {
            "dtype": _TAGS[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [self._offset, end],
        }
        self._stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._offset = end
        self.total_bytes += array.nbytes

    def close(self) -> None:
        """Completes the last shard, gives the files their final names and writes the index if there are several."""
        self._close_shard()
        count = len(self._shards)
        if count == 1:
            os.replace(self._part(0), self._directory / "model.safetensors")
            return
        weight_map = {}
        for index, names in enumerate(self._shards):
            file = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            os.replace(self._part(index), self._directory / file)
            weight_map |= dict.fromkeys(names, file)
        metadata = {"total_size": self.total_bytes}
        write_json(self._directory / _INDEX, {"metadata": metadata, "weight_map": weight_map})

    def abort(self) -> None:
        """Closes the file at hand without completing it."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _part(self, index: int) -> Path:
        return self._directory / f".shard-{index}.part"

    def _open(self) -> None:
        self._close_shard()
        self._stream = self._part(len(self._shards)).open("wb")
        self._stream.write(b" " * (8 + self._header_bytes))
        self._entries, self._offset = {}, 0

    def _close_shard(self) -> None:
        if self._stream is None:
            return
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._entries}).encode()
        if len(header) > self._header_bytes:
            raise CheckpointError(
                f"header of {len(header)} bytes exceeds the {self._header_bytes} kept for it"
            )
        self._stream.seek(0)
        self._stream.write(self._header_bytes.to_bytes(8, "little") + header)
        sync(self._stream)
        self._stream.close()
        self._stream = None
        self._shards.append(list(self._entries))


def write_shards(
    directory: Path,
    tensors: Iterable[tuple[str, Shaped[np.ndarray, "..."]]],
    *,
    shard_bytes: int,
    header_bytes: int,
) -> None:
    """Writes named tensors as they come, see `ShardWriter`."""
    shards = ShardWriter(directory, shard_bytes=shard_bytes, header_bytes=header_bytes)
    try:
        for name, array in tensors:
            shards.add(name, array)
        shards.close()
    finally:
        shards.abort()


def header_space(names: Sequence[str], tensors_per_name: int) -> int:
    """Bytes that suffice for a header with up to `tensors_per_name` tensors below each of `names`."""
    # dtype, shape and offsets of one entry take less than 160 bytes, its suffix less than 40.
    return 64 + sum(tensors_per_name * (len(name) + 200) for name in names)


@contextlib.contextmanager
def whole_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling folder that becomes `path` when the block ends without an error, else disappears.

    Raises:
        CheckpointError: `path` exists and is not an empty folder, and `overwrite` is not given.
    """
    path = path.absolute()
    check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        yield temporary
        # mkdtemp makes folders that only their owner may enter; the result should follow the umask.
        temporary.chmod(0o777 & ~_umask())
        _replace_folder(temporary, path, overwrite)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_free(path: Path, overwrite: bool) -> None:
    """Raises CheckpointError unless a folder may be written at `path`, whose parents need not exist."""
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path}: exists and is not a folder; choose another output")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise CheckpointError(
            f"{path}: exists and is not empty; choose another output, or overwrite it"
        )
    place = next(place for place in path.absolute().parents if os.path.lexists(place))
    if not place.is_dir():
        raise CheckpointError(f"{path}: {place} is not a folder; choose another output")
    if not os.access(place, os.W_OK | os.X_OK):
        raise CheckpointError(f"{path}: no permission to write in {place}; choose another output")


def _replace_folder(temporary: Path, path: Path, overwrite: bool) -> None:
    check_free(path, overwrite)
    if not path.is_dir():
        os.replace(temporary, path)
    else:
        # rename() replaces empty folders only: an old one steps aside first and is deleted once the new one is there.
        aside = temporary.with_name(temporary.name.replace("partial", "replaced"))
        os.replace(path, aside)
        os.replace(temporary, path)
        shutil.rmtree(aside, ignore_errors=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes an object as indented JSON and waits until it is on the disk."""
    with path.open("wb") as stream:
        stream.write((json.dumps(content, indent=2) + "\n").encode())
        sync(stream)


def replace_json(path: Path, content: dict[str, Any], indent: int | None = None) -> None:
    """Writes an object as JSON beside `path` and gives it that name once it is on the disk."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as stream:
        stream.write((json.dumps(content, indent=indent) + "\n").encode())
        sync(stream)
    os.replace(temporary, path)


def sync(stream: BinaryIO) -> None:
    """Flushes a file through to the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
