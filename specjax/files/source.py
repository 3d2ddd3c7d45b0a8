"""The weights of a folder, whatever its files are: one file, shards with an index, zip pickles, Orbax."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from specjax.errors import CheckpointError
from specjax.files import base, orbax_store, pickle
from specjax.files.safetensors_file import SafetensorsFile

STANDARD_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model_gptq.safetensors",
    "model_gptq_marlin.safetensors",
    "gptq_model-4bit-128g.safetensors",
    "quant_model.safetensors",
    "quant_model.pt",
)


class ShardedSource:
    """Files listed in an index {"weight_map": {tensor: file}}; nothing else in the folder is looked
    at.

    Raises:
        CheckpointError: the index is malformed, a shard is missing, or a shard lacks a tensor that
            the index puts there.
    """

    def __init__(self, index: Path):
        self.path = index
        weight_map = base.read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map")
        shards: dict[str, base.TensorSource] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(f"{index}: weight_map[{name}] = {file!r} is not a file name")
            if file not in shards:
                if not (index.parent / file).is_file():
                    raise CheckpointError(f"shard {file} is missing: {index} puts {name} there")
                shards[file] = open_file(index.parent / file)
        held = {file: frozenset(shard.names()) for file, shard in shards.items()}
        for name, file in weight_map.items():
            if name not in held[file]:
                raise CheckpointError(
                    f"{name} is missing from {index.parent / file} ({index.name})"
                )
        self._files = {name: shards[file] for name, file in weight_map.items()}

    def names(self) -> Sequence[str]:
        return tuple(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file(name).shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._file(name).dtype(name)

    def read(self, name: str) -> np.ndarray:
        return self._file(name).read(name)

    def _file(self, name: str) -> base.TensorSource:
        if name not in self._files:
            raise CheckpointError(f"{name} is missing from {self.path}")
        return self._files[name]


def open_source(directory: Path, names: Sequence[str] = STANDARD_NAMES) -> base.TensorSource:
    """Opens a folder's Orbax checkpoint, or the first of `names` that exists: a weight file or an index of shards.

    Raises:
        FileNotFoundError: none of them exists.
        CheckpointError: the one that exists is malformed or incomplete.
    """
    if (directory / "orbax").is_dir():
        return orbax_store.OrbaxSource(directory / orbax_store.FOLDER)
    for name in names:
        if (directory / name).is_file():
            return open_file(directory / name)
    raise FileNotFoundError(f"no weights in {directory}: looked for {', '.join(names)}")


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
        return ShardedSource(path)
    match path.suffix:
        case ".safetensors":
            return SafetensorsFile(path)
        case ".bin" | ".pt" | ".pth":
            return pickle.TorchFile(path)
    raise CheckpointError(
        f"{path}: unknown kind of weight file (.safetensors, .bin, .pt, .pth or .index.json)"
    )
