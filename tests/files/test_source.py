"""safetensors files and shards: zero-copy reading, and what damaged files say."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from specjax.errors import CheckpointError
from specjax.files import base as file_base
from specjax.files import safetensors_file, source
from tests import paths

TAGS = {dtype: tag for tag, dtype in safetensors_file.DTYPES.items()}


def write(path: Path, tensors: dict[str, np.ndarray], edit=lambda header: None) -> Path:
    """A safetensors file by hand: it covers dtypes that numpy's writer refuses, and malformed headers."""
    header, blobs, position = {"__metadata__": {"format": "pt"}}, [], 0
    for name, array in tensors.items():
        data = array.tobytes()
        offsets = [position, position + len(data)]
        header[name] = {
            "dtype": TAGS[array.dtype],
            "shape": list(array.shape),
            "data_offsets": offsets,
        }
        position = offsets[1]
        blobs.append(data)
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))
    return path


def values(dtype: np.dtype, shape=(3, 5)) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 3, shape).astype(dtype)


@pytest.mark.parametrize("dtype", TAGS, ids=str)
def test_every_dtype(tmp_path, dtype):
    odd = np.ones(3, np.uint8)  # the tensors behind it are not aligned to their item size
    file = safetensors_file.SafetensorsFile(
        write(tmp_path / "m.safetensors", {"odd": odd, "x": values(dtype), "y": values(dtype, ())})
    )
    assert file.names() == ("odd", "x", "y")
    assert (file.shape("x"), file.dtype("x")) == ((3, 5), dtype)
    for name in ("x", "y"):
        read = file.read(name)
        assert read.dtype == dtype and not read.flags.writeable
        np.testing.assert_array_equal(read, values(dtype, read.shape))


def test_agrees_with_the_safetensors_package():
    path = paths.fixture("tiny-fp16") / "model.safetensors"
    ours, theirs = safetensors_file.SafetensorsFile(path), safetensors.numpy.load_file(path)
    assert set(ours.names()) == set(theirs)
    for name, expected in theirs.items():
        np.testing.assert_array_equal(ours.read(name), expected)


def test_reading_does_not_copy(tmp_path):
    file = safetensors_file.SafetensorsFile(
        write(tmp_path / "m.safetensors", {"x": values(np.float32)})
    )
    assert np.shares_memory(file.read("x"), file.read("x"))


def test_missing_tensor_names_tensor_and_file(tmp_path):
    file = safetensors_file.SafetensorsFile(
        write(tmp_path / "m.safetensors", {"x": values(np.float32)})
    )
    with pytest.raises(CheckpointError, match=r"y is missing from .*m\.safetensors"):
        file.read("y")


def test_truncated_data_names_the_first_tensor_cut(tmp_path):
    tensors = {name: values(np.float32, (16, 16)) for name in ("first", "second", "third")}
    path = write(tmp_path / "m.safetensors", tensors)
    path.write_bytes(path.read_bytes()[: -1024 - 8])
    with pytest.raises(CheckpointError, match=r"m\.safetensors is truncated at tensor second"):
        safetensors_file.SafetensorsFile(path)


@pytest.mark.parametrize("size", [0, 4, 20])
def test_truncated_header(tmp_path, size):
    path = write(tmp_path / "m.safetensors", {"x": values(np.float32)})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"m\.safetensors is (empty|truncated)"):
        safetensors_file.SafetensorsFile(path)


def test_not_a_safetensors_file(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes((4).to_bytes(8, "little") + b"oops" + bytes(100))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        safetensors_file.SafetensorsFile(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_offsets": [0, 8]}, r"x of shape \[3, 5\] and dtype F32 takes 60 bytes.* 8"),
        ({"data_offsets": [60, 0]}, "malformed header entry of tensor x"),
        ({"data_offsets": None}, "malformed header entry of tensor x"),
        ({"shape": [3.0, 5]}, "malformed header entry of tensor x"),
        ({"shape": [-3, -5]}, "malformed header entry of tensor x"),
    ],
)
def test_malformed_entries(tmp_path, change, message):
    tensors = {"x": values(np.float32)}
    path = write(tmp_path / "m.safetensors", tensors, lambda header: header["x"].update(change))
    with pytest.raises(CheckpointError, match=message):
        safetensors_file.SafetensorsFile(path)


def test_unknown_dtype_is_refused_when_read(tmp_path):
    def edit(header):
        header["x"]["dtype"] = "F4"

    path = write(tmp_path / "m.safetensors", {"x": values(np.uint8), "y": values(np.int8)}, edit)
    file = safetensors_file.SafetensorsFile(path)
    assert file.read("y").shape == (3, 5)
    with pytest.raises(CheckpointError, match=r"x in .* has dtype F4"):
        file.read("x")


@pytest.mark.parametrize("dtype", [d for d in TAGS if d in file_base._NOT_FINITE_BITS], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_values_name_tensor_and_place(tmp_path, dtype, bad):
    array = values(dtype)
    array[1, 2] = bad
    file = safetensors_file.SafetensorsFile(write(tmp_path / "m.safetensors", {"x": array}))
    finite = bool(np.isfinite(array.astype(np.float64)).all())
    if finite:  # float8_e4m3fn saturates and e8m0 has no infinity
        file.read("x")
        return
    with pytest.raises(
        CheckpointError, match=r"x in .*m\.safetensors has the value .* at \(1, 2\)"
    ):
        file.read("x")


@pytest.mark.parametrize("dtype", [d for d in TAGS if d in file_base._NOT_FINITE_BITS], ids=str)
def test_finite_check_agrees_with_numpy_on_all_bit_patterns(dtype):
    width = min(dtype.itemsize, 2)
    bits = np.arange(1 << (8 * width), dtype=f"u{dtype.itemsize}") << (8 * (dtype.itemsize - width))
    for chunk in np.array_split(bits, 256):
        array = chunk.view(dtype)
        with np.errstate(invalid="ignore"):  # signalling NaNs
            finite = np.isfinite(array.astype(np.float64))
        file_base.check_finite(array[finite], "x", Path("f"))
        for value in array[~finite][:2]:
            with pytest.raises(CheckpointError):
                file_base.check_finite(np.array([value], dtype), "x", Path("f"))


def test_not_finite_beyond_the_first_chunk():
    array = np.zeros((1025, 1024), ml_dtypes.bfloat16)
    array[1024, 1000] = np.nan
    with pytest.raises(CheckpointError, match=r"x in f has the value nan at \(1024, 1000\)"):
        file_base.check_finite(array, "x", Path("f"))


def shard(folder: Path, **weight_map: str) -> Path:
    for file in set(weight_map.values()):
        held = [name for name, where in weight_map.items() if where == file]
        write(folder / file, {name: values(np.float32) for name in held})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards(tmp_path):
    shard(tmp_path, a="m-1.safetensors", b="m-2.safetensors", c="m-1.safetensors")
    opened = source.open_source(tmp_path)
    assert opened.names() == ("a", "b", "c")
    assert (opened.shape("b"), opened.dtype("b")) == ((3, 5), np.float32)
    np.testing.assert_array_equal(opened.read("c"), values(np.float32))
    with pytest.raises(CheckpointError, match=r"d is missing from .*index\.json"):
        opened.read("d")


def test_missing_shard_is_named(tmp_path):
    shard(tmp_path, a="m-1.safetensors", b="m-2.safetensors")
    (tmp_path / "m-2.safetensors").unlink()
    opened = source.open_source(tmp_path)
    opened.check_held(lambda name: name == "c")
    for look in (opened.read, lambda name: opened.check_held(lambda needed: needed == name)):
        with pytest.raises(
            CheckpointError, match=r"shard m-2\.safetensors is missing.* puts b there"
        ):
            look("b")


def test_an_entry_that_no_shard_holds_is_an_error_when_it_is_read(tmp_path, caplog):
    shard(tmp_path, a="m-1.safetensors", b="m-2.safetensors")
    write(tmp_path / "m-2.safetensors", {"other": values(np.float32)})
    opened = source.open_source(tmp_path)
    assert opened.names() == ("a", "other")
    assert "names 1 tensors that no file holds (b)" in caplog.text
    np.testing.assert_array_equal(opened.read("a"), values(np.float32))
    with pytest.raises(CheckpointError, match=r"b is missing from .*m-2\.safetensors \(model\."):
        opened.read("b")


def test_a_tensor_in_another_shard_than_the_index_says_is_found(tmp_path):
    shard(tmp_path, a="m-1.safetensors", b="m-2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "m-2.safetensors", "b": "m-1.safetensors"}}))
    opened = source.open_source(tmp_path)
    np.testing.assert_array_equal(opened.read("b"), values(np.float32))


def test_a_tensor_in_two_shards(tmp_path):
    index = shard(tmp_path, a="m-1.safetensors", b="m-2.safetensors")
    write(tmp_path / "m-2.safetensors", {name: values(np.float32, (2, 2)) for name in "ab"})
    assert source.open_source(tmp_path).shape("a") == (3, 5)  # the index says in which
    index.write_text(json.dumps({"weight_map": {"b": "m-1.safetensors", "c": "m-2.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"a is in m-1\.safetensors and in m-2\.safetensors"):
        source.open_source(tmp_path)


def test_shards_in_a_folder_below(tmp_path):
    (tmp_path / "shards").mkdir()
    shard(tmp_path, a="shards/m-1.safetensors", b="m-2.safetensors")
    assert source.open_source(tmp_path).names() == ("a", "b")


def test_shards_without_an_index(tmp_path):
    for index, name in enumerate("ab"):
        file = tmp_path / f"model-{index + 1:05d}-of-00002.safetensors"
        write(file, {name: values(np.float32)})
    assert source.open_source(tmp_path).names() == ("a", "b")


def test_a_byte_order_mark_and_no_tensors_in_a_shard(tmp_path):
    index = shard(tmp_path, a="m-1.safetensors", b="m-2.safetensors")
    write(tmp_path / "m-2.safetensors", {}, lambda header: header.update(__metadata__=None))
    index.write_bytes(b"\xef\xbb\xbf" + index.read_bytes() + b" \n")
    assert source.open_source(tmp_path).names() == ("a",)


@pytest.mark.parametrize("move", [-20, 20])
def test_tensors_that_overlap_or_leave_gaps(tmp_path, move):
    def edit(header):
        header["b"]["data_offsets"] = [60 + move, 120 + move]

    tensors = {"a": values(np.float32), "b": values(np.float32), "c": values(np.float32)}
    path = write(tmp_path / "m.safetensors", tensors, edit)
    with pytest.raises(CheckpointError, match=r"data of tensor [bc] begin at byte"):
        safetensors_file.SafetensorsFile(path)


def test_data_that_belong_to_no_tensor(tmp_path):
    path = write(tmp_path / "m.safetensors", {"a": values(np.float32)})
    path.write_bytes(path.read_bytes() + bytes(8))
    with pytest.raises(CheckpointError, match="take 60 bytes, but 68 follow the header"):
        safetensors_file.SafetensorsFile(path)


@pytest.mark.parametrize("file", ["../m.safetensors", "/tmp/m.safetensors", 3])
def test_index_cannot_leave_the_folder(tmp_path, file):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match="is not a file name"):
        source.open_source(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[]", "expected an object"), ("{}", "weight_map")],
)
def test_malformed_index(tmp_path, text, message):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        source.open_source(tmp_path)


def test_stray_safetensors_are_ignored(tmp_path):
    write(tmp_path / "consolidated.safetensors", {"stray": values(np.float32)})
    with pytest.raises(FileNotFoundError, match=r"no weights in .*model\.safetensors"):
        source.open_source(tmp_path)
    write(tmp_path / "model.safetensors", {"x": values(np.float32)})
    assert source.open_source(tmp_path).names() == ("x",)


def test_other_names_can_be_asked_for(tmp_path):
    write(tmp_path / "rotated.safetensors", {"x": values(np.float32)})
    assert source.open_source(tmp_path, ["rotated.safetensors"]).names() == ("x",)


def test_consolidated_weights_are_read_where_their_names_fit(tmp_path):
    file = tmp_path / "consolidated.safetensors"
    write(file, {"tok_embeddings.weight": values(np.float32)})
    with pytest.raises(FileNotFoundError, match=r"consolidated.*tok_embeddings.*Mistral's own"):
        source.open_source(tmp_path)
    write(file, {"model.norm.weight": values(np.float32)})
    assert source.open_source(tmp_path).names() == ("model.norm.weight",)


@pytest.mark.parametrize("file", ["model_gptq.safetensors", "quant_model.safetensors"])
def test_names_of_other_tools(tmp_path, file):
    write(tmp_path / file, {"x": values(np.int32)})
    assert source.open_source(tmp_path).names() == ("x",)


def test_unknown_suffix(tmp_path):
    (tmp_path / "w.npz").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="unknown kind of weight file"):
        source.open_file(tmp_path / "w.npz")
    with pytest.raises(FileNotFoundError, match="no such file"):
        source.open_file(tmp_path / "none.safetensors")
