"""torch.save archives read without torch: values, strides, and pickles that want to run code."""

import collections
import contextlib
import io
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

from specjax.errors import CheckpointError
from specjax.files import pickle as torch_pickle
from specjax.files import source
from tests import paths

STORAGE_OF = {dtype: name for name, dtype in torch_pickle.STORAGES.items()}


class Storage:
    """What stands for a storage while pickling."""

    def __init__(self, key: str, array: np.ndarray):
        self.key, self.array = key, array


class Tensor(NamedTuple):
    storage: Storage
    offset: int
    shape: tuple
    strides: tuple


class Parameter:
    def __init__(self, tensor: Tensor):
        self.tensor = tensor


@contextlib.contextmanager
def torch_names():
    """Modules with the names that torch pickles refer to; they exist only while a file is written."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in torch_pickle.STORAGES:
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        function = types.FunctionType((lambda *args: None).__code__, {}, name)
        function.__module__, function.__qualname__ = "torch._utils", name
        setattr(utils, name, function)
    assert "torch" not in sys.modules
    sys.modules |= {"torch": torch, "torch._utils": utils}
    try:
        yield torch, utils
    finally:
        del sys.modules["torch"], sys.modules["torch._utils"]


def dumps(value) -> bytes:
    with torch_names() as (torch, utils):

        class Pickler(pickle.Pickler):
            def persistent_id(self, item):
                if not isinstance(item, Storage):
                    return None
                kind = getattr(torch, STORAGE_OF[item.array.dtype])
                return ("storage", kind, item.key, "cpu", item.array.size)

            def reducer_override(self, item):
                if isinstance(item, Tensor):
                    args = (*item, False, collections.OrderedDict())
                    return utils._rebuild_tensor_v2, args
                if isinstance(item, Parameter):
                    args = (item.tensor, True, collections.OrderedDict())
                    return utils._rebuild_parameter, args
                return NotImplemented

        buffer = io.BytesIO()
        Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def write(
    path: Path,
    pickled: bytes,
    storages: list[Storage],
    compression: int = zipfile.ZIP_STORED,
    byteorder: bytes = b"little",
) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", byteorder)
        for storage in storages:
            archive.writestr(f"archive/data/{storage.key}", storage.array.tobytes())
    return path


def contiguous(storage: Storage) -> Tensor:
    shape = storage.array.shape
    return Tensor(storage, 0, shape, tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape))))


def counting(dtype=np.float32, shape=(4, 6)) -> Storage:
    return Storage("0", np.arange(np.prod(shape)).reshape(shape).astype(dtype))


@pytest.mark.parametrize("dtype", STORAGE_OF, ids=str)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_dtypes(tmp_path, dtype, compression):
    storage = counting(dtype)
    tensor = contiguous(storage)
    file = torch_pickle.TorchFile(
        write(tmp_path / "w.bin", dumps({"w": tensor, "step": 3}), [storage], compression)
    )
    assert file.names() == ("w",)
    assert (file.shape("w"), file.dtype("w")) == ((4, 6), dtype)
    read = file.read("w")
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, storage.array)


def test_strides_offsets_and_shared_storages(tmp_path):
    storage = counting(ml_dtypes.bfloat16, (5, 8))
    tensors = {
        "transposed": Tensor(storage, 0, (8, 5), (1, 8)),
        "columns": Tensor(storage, 2, (5, 3), (8, 2)),
        "row": Tensor(storage, 16, (8,), (1,)),
        "scalar": Tensor(storage, 39, (), ()),
        "expanded": Tensor(storage, 3, (4, 2), (0, 8)),
        "empty": Tensor(storage, 0, (0, 8), (8, 1)),
    }
    file = torch_pickle.TorchFile(write(tmp_path / "w.pt", dumps(tensors), [storage]))
    full = storage.array
    expected = {
        "transposed": full.T,
        "columns": full[:, 2:7:2],
        "row": full[2],
        "scalar": full[4, 7],
        "expanded": np.broadcast_to(full[:2, 3], (4, 2)),
        "empty": full[:0],
    }
    for name, array in expected.items():
        assert file.read(name).shape == array.shape
        np.testing.assert_array_equal(file.read(name), array)


def test_parameters_and_nested_dictionaries(tmp_path):
    storage = counting()
    state = collections.OrderedDict(weight=Parameter(contiguous(storage)))
    state._metadata = collections.OrderedDict(version=1)  # Module.state_dict() sets this
    saved = {"epoch": 2, "model": state, "names": ["a"]}
    file = torch_pickle.TorchFile(write(tmp_path / "w.pth", dumps(saved), [storage]))
    assert file.names() == ("model.weight",)
    np.testing.assert_array_equal(file.read("model.weight"), storage.array)


def test_single_tensor(tmp_path):
    storage = counting(np.float64)
    file = torch_pickle.TorchFile(write(tmp_path / "r.pth", dumps(contiguous(storage)), [storage]))
    assert file.names() == (torch_pickle.SINGLE,)
    np.testing.assert_array_equal(file.read(torch_pickle.SINGLE), storage.array)


@pytest.mark.parametrize(
    ("folder", "file", "twin"),
    [
        ("eagle3-tiny", "pytorch_model.bin", "model.safetensors"),
        pytest.param(
            *("eagle2-tiny", "pytorch_model.bin", "model.safetensors"), marks=pytest.mark.slow
        ),
        pytest.param(
            *("medusa-tiny", "medusa_lm_head.pt", "medusa_lm_head.safetensors"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("qserve-w8a8", "quant_model.pt", "quant_model.safetensors"), marks=pytest.mark.slow
        ),
        pytest.param(
            *("qserve-w4a8-g128", "quant_model.pt", "quant_model.safetensors"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_files_of_torch_equal_their_safetensors_twins(folder, file, twin):
    """Slow ones are here for the fixtures that are too large to be copied beside the tests."""
    ours = source.open_file(paths.require(Path("checkpoints", folder, file)))
    beside = ours.path.parent / twin
    theirs = source.open_file(beside if beside.is_file() else paths.fixture(folder) / twin)
    assert set(ours.names()) == set(theirs.names())
    for name in theirs.names():
        assert ours.dtype(name) == theirs.dtype(name)
        np.testing.assert_array_equal(ours.read(name), theirs.read(name))


def test_rotation_matrix_of_torch():
    rotation = source.open_file(paths.fixture("rotation-tiny") / "rotation.pth")
    matrix = rotation.read(torch_pickle.SINGLE)
    assert matrix.dtype == np.float64
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(256), atol=1e-12)


def test_rotated_head_of_torch():
    file = source.open_source(paths.fixture("rotation-eagle2-tiny"))
    assert file.read("fc.weight").shape == (256, 512)


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_malicious_pickle_is_refused_by_name_and_not_run(tmp_path):
    marker = tmp_path / "ran"
    path = write(tmp_path / "w.bin", pickle.dumps({"w": Evil(marker)}, protocol=2), [])
    with pytest.raises(CheckpointError, match=r"refused.*(posix|nt)\.system"):
        torch_pickle.TorchFile(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["builtins eval", "torch._utils _rebuild_device", "torch.nn.modules.linear Linear"]
)
def test_other_globals_are_refused_by_name(tmp_path, name):
    module, attribute = name.split()
    pickled = f"c{module}\n{attribute}\n(V1\ntR.".encode()
    with pytest.raises(CheckpointError, match=f"{module}.{attribute}"):
        torch_pickle.TorchFile(write(tmp_path / "w.bin", pickled, []))


@pytest.mark.parametrize(
    "pickled",
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n(I1\nI2\nI3\nI4\ntR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(N(I1\nV__defaults__\nttb.",
        b"(dp0\nVa\ng0\ns.",  # a dictionary that contains itself
        b"\x80\x02}q\x00",
        b"not a pickle",
    ],
    ids=["no-storage", "set-attribute", "cycle", "cut", "text"],
)
def test_malformed_pickles(tmp_path, pickled):
    with pytest.raises(CheckpointError, match=r"w\.bin: malformed pickle"):
        torch_pickle.TorchFile(write(tmp_path / "w.bin", pickled, []))


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(1, (4, 6), (6, 1)), (0, (4, 6), (7, 1)), (0, (2, 2), (-1, 1)), (-1, (1,), (1,))],
)
def test_tensor_outside_its_storage(tmp_path, offset, shape, strides):
    storage = counting()
    pickled = dumps({"w": Tensor(storage, offset, shape, strides)})
    with pytest.raises(CheckpointError, match=r"tensor w of shape .* is not within its storage"):
        torch_pickle.TorchFile(write(tmp_path / "w.bin", pickled, [storage]))


def test_short_and_missing_storages(tmp_path):
    storage = counting()
    pickled = dumps({"w": contiguous(storage)})
    with pytest.raises(CheckpointError, match="data of tensor w is missing"):
        torch_pickle.TorchFile(write(tmp_path / "w.bin", pickled, []))
    short = Storage("0", storage.array[:2])
    with pytest.raises(CheckpointError, match=r"tensor w has 48 bytes of data.* takes 96"):
        torch_pickle.TorchFile(write(tmp_path / "w.bin", pickled, [short]))


def test_not_finite_value_names_the_tensor(tmp_path):
    storage = counting()
    storage.array[2, 3] = np.nan
    path = write(tmp_path / "w.bin", dumps({"w": contiguous(storage)}), [storage])
    with pytest.raises(CheckpointError, match=r"w in .*w\.bin has the value nan at \(2, 3\)"):
        torch_pickle.TorchFile(path).read("w")


def test_legacy_format_says_how_to_convert(tmp_path):
    path = tmp_path / "w.bin"
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2))
    with pytest.raises(CheckpointError, match=r"torch < 1\.6.*torch\.save\(torch\.load"):
        torch_pickle.TorchFile(path)


def test_truncated_archive(tmp_path):
    storage = counting()
    path = write(tmp_path / "w.bin", dumps({"w": contiguous(storage)}), [storage])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"w\.bin is truncated"):
        torch_pickle.TorchFile(path)


def test_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"without one data\.pkl"):
        torch_pickle.TorchFile(tmp_path / "w.pt")


def test_big_endian_archive(tmp_path):
    storage = counting()
    pickled = dumps({"w": contiguous(storage)})
    with pytest.raises(CheckpointError, match="big-endian"):
        torch_pickle.TorchFile(write(tmp_path / "w.pt", pickled, [storage], byteorder=b"big"))
