"""Exports: round trips of every format, GPTQModel's layout to the byte, shards, and atomic folders."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

from specjax.checkpoints import export, formats, hf, open_checkpoint
from specjax.errors import CheckpointError
from specjax.files import manifest, orbax_store, writer
from specjax.files import source as sources
from specjax.models import layers
from specjax.quant import rotation as rotations
from specjax.quant import scheme as schemes
from specjax.quant import view
from specjax.quant.linear import QuantizedLinear
from specjax.quantize import rotate
from tests import paths
from tests.checkpoints import folders
from tests.quant import random_linears

SHAPES = {
    "q_proj": (256, 256),
    "k_proj": (128, 256),
    "v_proj": (128, 256),
    "o_proj": (256, 256),
    "gate_proj": (512, 256),
    "up_proj": (512, 256),
    "down_proj": (256, 512),
}
EXACT = [
    ("tiny-gptq-g128", "gptq"),
    ("tiny-gptq-actorder", "gptq"),
    ("tiny-awq-g128", "gptq"),
    ("specmquant-w4a16-converted", "gptq"),
    ("tiny-gptq-g128", "compressed-tensors"),
    ("tiny-awq-g128", "compressed-tensors"),
    ("tiny-ct-w4a16", "compressed-tensors"),
    ("tiny-ct-w8a8-sq", "compressed-tensors"),
    ("tiny-qqq", "qqq"),
    ("tiny-qqq-g128", "qqq"),
    ("specmquant-qqq-g128-converted", "qqq"),
    ("qserve-w8a8", "qserve"),
    ("qserve-w4a8-g128", "qserve"),
    ("tiny-awq-g128", "specjax"),
    ("tiny-qqq-g128", "specjax"),
    ("tiny-ct-w8a8-sq", "specjax"),
    ("qserve-w4a8-g128", "specjax"),
]


def load(path):
    checkpoint = open_checkpoint(path)
    return folders.build(checkpoint), checkpoint


def quantized(name: str, group_size: int = -1, **extra):
    """tiny-fp16 with random linears of a scheme."""
    model, checkpoint = load(paths.fixture("tiny-fp16"))
    scheme = schemes.lookup(name)
    for seed, layer in enumerate(model.model.layers):
        for leaf, (out, inp) in SHAPES.items():
            parent = layer.mlp if hasattr(layer.mlp, leaf) else layer.self_attn
            size = inp if group_size == -1 else group_size
            setattr(parent, leaf, random_linears.make(scheme, out, inp, size, seed, **extra))
    return model, checkpoint.config


def assert_same_model(found, expected):
    """Equal linears and equal dense parameters."""
    for (name, ours), (other, theirs) in zip(
        export.parameters(found), export.parameters(expected), strict=True
    ):
        assert name == other
        if isinstance(theirs, QuantizedLinear):
            folders.assert_same_linear(ours, theirs)
        else:
            pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
            assert all(np.array_equal(a, b) for a, b in pairs), name


@pytest.mark.parametrize("name, format", EXACT)
def test_import_export_import(tmp_path, name, format):
    model, checkpoint = load(paths.fixture(name))
    path = export.export(model, checkpoint.config, tmp_path / "out", format=format)
    again, found = load(path)
    assert (found.format, found.config.dtype) == (format, "float32")
    if (name, format) in (("tiny-awq-g128", "gptq"), ("tiny-ct-w4a16", "gptq")):
        model = with_half_scales(model)
    assert_same_model(again, model)


def with_half_scales(model):
    """float16 is the scale dtype of GPTQ and QServe files."""

    def half(node):
        if not isinstance(node, QuantizedLinear):
            return node
        fields = {f: getattr(node, f) for f in ("scales", "channel_scales")}
        floats = {
            f: array.astype(jnp.float16)
            for f, array in fields.items()
            if array is not None and array.dtype != jnp.int8
        }
        return dataclasses.replace(node, **floats)

    return jax.tree.map(half, model, is_leaf=lambda n: isinstance(n, QuantizedLinear))


@pytest.mark.parametrize(
    "scheme, group_size, format, extra",
    [
        ("w4a16", 32, "gptq", {}),
        ("w8a16", -1, "gptq", {}),
        ("w4a16", 64, "compressed-tensors", {}),
        ("w4a8-full", 32, "compressed-tensors", {"scale_dtype": jnp.float32}),
        ("w4a8-full", -1, "compressed-tensors", {"scale_dtype": jnp.bfloat16}),
        ("fp8", -1, "compressed-tensors", {}),
        ("w4a4-full", -1, "compressed-tensors", {}),
        ("w4a8-qqq", 128, "qqq", {}),
        ("w8a8-s16", -1, "qserve", {}),
        ("w4a8-qoq-s16", -1, "qserve", {"minima": True}),
        ("w4a8-qoq-s16", 128, "qserve", {}),
        ("fp4", 32, "specjax", {}),
    ],
)
def test_other_schemes(tmp_path, scheme, group_size, format, extra):
    model, config = quantized(scheme, group_size, **extra)
    if format == "qserve":
        model = with_half_scales(model)
    path = export.export(model, config, tmp_path / "out", format=format)
    assert_same_model(load(path)[0], model)


@pytest.mark.parametrize(
    "name, format, dtype, file",
    [
        ("tiny-gptq-g128", "gptq", "bfloat16", "model.safetensors"),
        ("tiny-gptq-actorder", "gptq", "bfloat16", "model.safetensors"),
        ("tiny-ct-w4a16", "compressed-tensors", "float32", "model.safetensors"),
        ("tiny-ct-w8a8-sq", "compressed-tensors", "float32", "model.safetensors"),
        ("tiny-qqq", "qqq", "bfloat16", "model.safetensors"),
        ("tiny-qqq-g128", "qqq", "bfloat16", "model.safetensors"),
        ("qserve-w8a8", "qserve", "float16", "quant_model.safetensors"),
        ("qserve-w4a8-g128", "qserve", "float16", "quant_model.safetensors"),
    ],
)
def test_export_equals_the_file_of_the_original_tool(tmp_path, name, format, dtype, file):
    """Names, dtypes, shapes and bytes; read back by the safetensors library."""
    model, checkpoint = load(paths.fixture(name))
    path = tmp_path / "out"
    export.export(model, checkpoint.config, path, format=format, dtype=dtype)
    ours, theirs = path / "model.safetensors", paths.fixture(name) / file
    with safetensors.safe_open(ours, "np") as a, safetensors.safe_open(theirs, "np") as b:
        assert set(a.keys()) == set(b.keys()) and a.metadata() == {"format": "pt"}
        names = list(b.keys())
        for tensor in names:
            found, expected = a.get_tensor(tensor), b.get_tensor(tensor)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), tensor
            assert found.tobytes() == expected.tobytes(), tensor


def test_gptq_configuration_is_that_of_gptqmodel(tmp_path):
    fixture = paths.fixture("tiny-gptq-g128")
    model, checkpoint = load(fixture)
    path = tmp_path / "out"
    export.export(model, checkpoint.config, path, format="gptq", dtype="bfloat16")
    ours, theirs = (json.loads((p / "config.json").read_text()) for p in (path, fixture))
    assert ours["dtype"] == "bfloat16"
    for field, expected in theirs.pop("quantization_config").items():
        if field != "meta":
            assert ours["quantization_config"][field] == expected, field
    side = json.loads((path / "quantize_config.json").read_text())
    assert side == ours["quantization_config"]
    for field in ("hidden_size", "rope_parameters", "num_key_value_heads", "eos_token_id"):
        assert ours[field] == theirs[field], field


@pytest.mark.parametrize("name", ["tiny-gptq-g128", "tiny-fp16"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dense(tmp_path, name, dtype):
    model, checkpoint = load(paths.fixture(name))
    path = tmp_path / "out"
    export.export(model, checkpoint.config, path, format="dense", dtype=dtype)
    again, found = load(path)
    assert (found.format, found.config.dtype) == ("hf", dtype)
    layer = model.model.layers[1].mlp.down_proj
    weight = layer.dequantize() if isinstance(layer, QuantizedLinear) else layer.weight[...]
    expected = weight.astype(dtype).astype(jnp.float32)
    assert np.array_equal(again.model.layers[1].mlp.down_proj.weight[...], expected)
    assert "quantization_config" not in json.loads((path / "config.json").read_text())


def test_shards_with_index(tmp_path):
    model, checkpoint = load(paths.fixture("tiny-gptq-g128"))
    whole, split = tmp_path / "whole", tmp_path / "split"
    export.export(model, checkpoint.config, whole, format="specjax")
    export.export(model, checkpoint.config, split, format="specjax", shard_bytes=2**20)
    index = json.loads((split / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert count == 3 and files[0] == f"model-00001-of-{count:05d}.safetensors"
    tensors = folders.read_all(whole / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in tensors.values())
    for name, expected in tensors.items():
        found = sources.open_file(split / index["weight_map"][name]).read(name)
        assert found.tobytes() == expected.tobytes(), name
    assert_same_model(load(split)[0], model)
    assert not (split / "model.safetensors").exists()


def test_orbax_layout(tmp_path):
    model, checkpoint = load(paths.fixture("tiny-qqq-g128"))
    path = tmp_path / "out"
    export.export(model, checkpoint.config, path, format="specjax", layout="orbax")
    assert manifest.read(path)["format"] == "specjax"
    source = orbax_store.OrbaxSource(path / orbax_store.FOLDER)
    config = json.loads((path / "config.json").read_text())
    found = formats.detect(config["quantization_config"], source, config)
    again = folders.build(hf.HFCheckpoint(path, checkpoint.config, source, found))
    assert_same_model(again, model)
    with pytest.raises(CheckpointError, match=r"x\.codes is missing from"):
        source.read("x.codes")
    with pytest.raises(CheckpointError, match="is not a complete Orbax checkpoint"):
        orbax_store.OrbaxSource(path)
    with pytest.raises(CheckpointError, match="layout='orbax' is for format='specjax'"):
        export.export(model, checkpoint.config, path, format="qqq", layout="orbax")


def test_online_rotation_needs_its_file_and_our_format(tmp_path):
    model, config = quantized("w4a4")
    rotation = rotations.random_hadamard(config, 0, online=True)
    file = rotations.save(rotation, tmp_path)
    model = rotate.attach(model, rotation)
    path = tmp_path / "out"
    with pytest.raises(CheckpointError, match="cannot express the rotation"):
        export.export(model, config, path, format="compressed-tensors", extra_files=[file])
    with pytest.raises(CheckpointError, match=r"rotation\.safetensors among"):
        export.export(model, config, path, format="specjax")
    export.export(
        *(model, config, path), format="specjax", rotation=rotation.id, extra_files=[file]
    )
    again = rotate.attach_from(load(path)[0], path)
    assert isinstance(again.model.layers[0].mlp.down_proj, rotations.RotatedInput)
    assert_same_model(again, model)


def test_extra_files_and_manifest(tmp_path):
    fixture = paths.fixture("tiny-gptq-g128")
    model, checkpoint = load(fixture)
    extra = [fixture / "tokenizer.json", fixture / "tokenizer_config.json"]
    path = export.export(
        *(model, checkpoint.config, tmp_path / "out"),
        format="compressed-tensors",
        extra_files=extra,
        rotation="sha256:1234",
        source="tiny",
    )
    for file in extra:
        assert (path / file.name).read_bytes() == file.read_bytes()
    written = manifest.read(path)
    assert (written["rotation"], written["source"]) == ("sha256:1234", "tiny")
    assert written["format"] == "compressed-tensors"
    assert set(written["files"]) == {f.name for f in path.iterdir()} - {manifest.NAME}
    assert manifest.read(fixture) is None


def test_taken_output_is_refused_unless_overwritten(tmp_path):
    model, checkpoint = load(paths.fixture("tiny-gptq-g128"))
    path = tmp_path / "out"
    path.mkdir()
    export.export(model, checkpoint.config, path, format="gptq")
    (path / "old.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"out: exists and is not empty"):
        export.export(model, checkpoint.config, path, format="dense")
    export.export(model, checkpoint.config, path, format="dense", overwrite=True)
    assert open_checkpoint(path).format == "hf" and not (path / "old.txt").exists()
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(CheckpointError, match=r"file: exists and is not a folder"):
        export.export(model, checkpoint.config, file, format="gptq", overwrite=True)
    with pytest.raises(CheckpointError, match=r"file/a/b: .*/file is not a folder"):
        writer.check_free(file / "a" / "b", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out"]


def test_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    model, checkpoint = load(paths.fixture("tiny-gptq-g128"))
    path = tmp_path / "out"
    export.export(model, checkpoint.config, path, format="gptq")
    before = {f.name: f.read_bytes() for f in path.iterdir()}
    seen = []

    def interrupted(*args, **kwargs):
        seen.extend(tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(export.writer, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export.export(model, checkpoint.config, path, format="gptq", overwrite=True)
    partial = [p for p in seen if p.name.startswith(".out.partial-")]
    assert len(partial) == 1 and list(tmp_path.iterdir()) == [path]
    assert {f.name: f.read_bytes() for f in path.iterdir()} == before


def test_half_written_folder_is_no_checkpoint(tmp_path):
    model, checkpoint = load(paths.fixture("tiny-gptq-g128"))
    path = export.export(model, checkpoint.config, tmp_path / "out", format="specjax")
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-1000])
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: has .* bytes, specjax\.json says"
    ):
        manifest.read(path)
    with pytest.raises(CheckpointError, match="incomplete"):
        open_checkpoint(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is missing"):
        manifest.read(path)
    (path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "name, format, message",
    [
        ("tiny-gptq-g128", "awq", r"format='awq' is unknown; known formats: dense, gptq"),
        ("tiny-fp16", "gptq", r"format='gptq' holds quantized linears and the model has none"),
        ("tiny-qqq", "gptq", r"q_proj: scheme w4a8-qqq does not fit format gptq"),
        ("tiny-gptq-g128", "qqq", r"q_proj: scheme w4a16 .* does not fit format qqq"),
        ("tiny-qqq-g128", "compressed-tensors", r"does not fit format compressed-tensors"),
        ("tiny-gptq-g128", "qserve", r"does not fit format qserve"),
    ],
)
def test_what_a_format_cannot_hold_is_named(tmp_path, name, format, message):
    model, checkpoint = load(paths.fixture(name))
    with pytest.raises(CheckpointError, match=message):
        export.export(model, checkpoint.config, tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())


def test_scales_that_half_precision_cannot_hold(tmp_path):
    model, config = quantized("w4a16", 64, scale_dtype=jnp.float32)
    layer = model.model.layers[1].mlp
    small = layer.up_proj.scales.at[0, 0].set(1e-9)
    layer.up_proj = dataclasses.replace(layer.up_proj, scales=small)
    with pytest.raises(CheckpointError, match=r"up_proj\.scales: the value 1e-09 does not fit"):
        export.export(model, config, tmp_path / "out", format="gptq")
    assert not list(tmp_path.iterdir())


def test_zero_points_that_four_bits_cannot_hold(tmp_path):
    model, config = quantized("w4a16-asym", 64)
    layer = model.model.layers[1].mlp
    zeros = layer.up_proj.zeros.at[0, 0].set(16)
    layer.up_proj = dataclasses.replace(layer.up_proj, zeros=zeros)
    for format in ("gptq", "compressed-tensors"):
        with pytest.raises(
            CheckpointError, match=r"up_proj\.zeros: the zero point 16 does not fit"
        ):
            export.export(model, config, tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())


def test_files_that_do_not_exist_and_fused_models(tmp_path):
    model, checkpoint = load(paths.fixture("tiny-gptq-g128"))
    arguments = (model, checkpoint.config, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        export.export(*arguments, format="gptq", extra_files=[tmp_path / "none.json"])
    weights = paths.fixture("tiny-gptq-g128") / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"the export writes its own model\.safetensors"):
        export.export(*arguments, format="gptq", extra_files=[weights])
    with pytest.raises(CheckpointError, match=r"dtype='float64' is not supported"):
        export.export(*arguments, format="gptq", dtype="float64")
    mlp = model.model.layers[0].mlp
    fused = view.fuse([mlp.gate_proj, mlp.up_proj])
    model.model.layers[0].mlp = layers.MLP(down_proj=mlp.down_proj, gate_up_proj=fused)
    with pytest.raises(CheckpointError, match=r"layers\.0: its projections are fused"):
        export.export(*arguments, format="gptq")
    assert not list(tmp_path.iterdir())
