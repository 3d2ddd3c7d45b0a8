"""Models by shape, targets by name, and what happens without the CUDA plugin."""

import importlib.util
import json
from importlib import metadata

import jax
import jax.numpy as jnp
import pytest

import specjax
from experiments import aot_compile
from specjax.aot import compile as aot
from specjax.aot import executable, kernels, programs, shapes, topology
from specjax.errors import CheckpointError, ConfigError
from specjax.models.prepare import weight_bytes
from specjax.pallas import device
from specjax.quant.linear import QuantizedLinear
from specjax.quant.packed_linear import PackedLinear

HAS_PLUGIN = importlib.util.find_spec("jax_plugins") is not None


def model(**changes):
    settings = dict(scheme="w4a16", group_size=128, dtype="bfloat16", backend="auto")
    return shapes.model(shapes.lookup("llama3-8b"), **settings | changes)


@pytest.mark.parametrize("name", topology.TARGETS)
def test_targets(name):
    target = topology.lookup(name)
    text = topology.target_config(target)
    assert f"core_count: {target.num_sms}" in text
    assert 'driver_version: "13.0.0"' in text
    assert target.shared_memory == device.SHARED_MEMORY[target.arch]


def test_unknown_names():
    with pytest.raises(ConfigError, match="h200, h100"):
        topology.lookup("h300")
    with pytest.raises(ConfigError, match="llama3-8b"):
        shapes.lookup("llama3-9b")
    with pytest.raises(ConfigError, match="matmul_w4a16"):
        list(kernels.cases("matmul", ["llama3-8b"], [1], topology.lookup("h200"), "bfloat16"))
    with pytest.raises(ConfigError, match="llama3-9b"):
        list(kernels.cases("glue", ["llama3-9b"], [1], topology.lookup("h200"), "bfloat16"))


def test_an_8b_model_of_4_bits_for_a_gpu_is_packed():
    with device.targeting(topology.lookup("h200")):
        target = model()
    linear = target.model.layers[0].self_attn.qkv_proj
    assert isinstance(linear, PackedLinear) and linear.out_features == 6144
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(target))
    # 4.125 bits for the layers' linears, 16 for embedding and head.
    expected = 6.979e9 * 4.125 / 8 + 2 * 2 * 128256 * 4096
    assert weight_bytes(target) == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_forms_of_other_backends_and_schemes():
    with device.targeting(topology.lookup("h200")):
        codes = model(backend="xla").model.layers[0].mlp.down_proj
        assert isinstance(codes, QuantizedLinear)
        for scheme in ("w8a8", "w4a8-qqq", "w4a8-qoq", "w4a16-asym", "w4a4"):
            assert isinstance(model(scheme=scheme).model.layers[0].mlp.down_proj, PackedLinear)
    dense = model(scheme="dense")
    assert weight_bytes(dense) == pytest.approx(16.06e9, rel=1e-2)


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "none"},
        pytest.param({"kind": "ngram", "draft_depth": 3}, marks=pytest.mark.slow),
        pytest.param({"kind": "eagle"}, marks=pytest.mark.slow),
        {"kind": "eagle", "num_nodes": 32, "vocabulary_size": 32768, "scheme": "w8a16"},
    ],
)
def test_arguments_of_the_decoding_program(spec):
    with device.targeting(topology.lookup("h200")):
        arguments = programs.decode_arguments(
            shapes.lookup("llama3-8b"),
            scheme="w4a16",
            group_size=128,
            drafter=spec,
            dtype="bfloat16",
            backend="auto",
            capacity=4096,
            batch=1,
        )
        if "vocabulary_size" in spec:
            head = arguments["drafter"].head
            assert head.lm_head.out_features == 32768
            assert isinstance(head.lm_head, PackedLinear)
    assert arguments["state"].cache.capacity == 4096
    with pytest.raises(ConfigError, match="medusa"):
        target = arguments["target"]
        shapes.abstract_drafter({"kind": "medusa"}, shapes.lookup("llama3-8b"), target)


@pytest.mark.skipif(HAS_PLUGIN, reason="the CUDA plugin is installed here")
def test_without_the_plugin_one_is_told_what_to_do(run, tmp_path):
    code, _, errors = run(aot_compile, "--kernels_only", f"--output={tmp_path / 'out'}")
    assert code == 2
    assert "make aot" in errors and errors.count("\n") == 1


def test_bad_flags(run, tmp_path):
    for flag, word in (("--target=h300", "h300"), ("--model_shape=x", "'x'")):
        code, _, errors = run(aot_compile, flag, f"--output={tmp_path}")
        assert code == 2 and word in errors
    code, _, errors = run(aot_compile, "--kernels_only", "--m=1,x", f"--output={tmp_path}")
    assert code == 2 and "whole numbers" in errors


def test_a_process_that_fails_says_where_to_look(tmp_path):
    with pytest.raises(Exception, match=r"compile\.log"):
        aot.in_process("specjax.aot.no_such_module:run", "h200", tmp_path, {})


def test_versions_need_no_installed_package(monkeypatch):
    """A machine with a GPU may have a copy of this folder only."""
    installed = metadata.version

    def version(name):
        if name == "specjax":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata, "version", version)
    assert executable.versions()["specjax"] == specjax.__version__


def test_executables_of_other_machines_are_refused(tmp_path):
    compiled = jax.jit(lambda x: {"y": x["x"] + 1}).lower({"x": jnp.ones(3)}).compile()
    path = tmp_path / "program"
    facts = executable.save(compiled, path, target="NVIDIA H200")
    assert facts["executable_bytes"] == path.stat().st_size
    with pytest.raises(CheckpointError, match="NVIDIA H200"):
        executable.load(path, {}, None)
    facts = json.loads((tmp_path / "program.json").read_text())
    facts["target"] = jax.devices()[0].device_kind
    (tmp_path / "program.json").write_text(json.dumps(facts))
    path.write_bytes(b"no pickle")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        executable.load(path, {}, None)
    with pytest.raises(FileNotFoundError):
        executable.load(tmp_path / "other", {}, None)
