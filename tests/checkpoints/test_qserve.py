"""QServe: against DeepCompressor's files and recorded accumulators, an independent packer, and both s2 orders."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from specjax.checkpoints import marlin, open_checkpoint, qserve
from specjax.errors import CheckpointError
from specjax.files import source as sources
from specjax.files import torch_writer
from specjax.pallas.matmul import reference as semantics
from specjax.quant import activations
from tests import paths
from tests.checkpoints import folders, packers

PREFIX = "model.layers.0.mlp.up_proj"
OUT, IN = 64, 256


def make(grouped: bool, order=packers.S2_OMNISERVE):
    """Tensors of one QoQ linear, and its weight in float64."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (OUT, IN))
    s1 = rng.uniform(0.001, 0.01, OUT).astype(np.float16)
    tensors = {"qweight": packers.qserve(codes), "s1_scales": s1}
    if not grouped:
        szeros = rng.uniform(0, 0.1, OUT).astype(np.float16)
        tensors["s1_szeros"] = szeros
        weight = codes * s1[:, None].astype("f8") - szeros[:, None].astype("f8")
        return tensors, weight
    # Every third output uses the codes 0 .. 9 only, with a larger step: other outputs would overflow with it.
    few = np.arange(OUT)[:, None] % 3 == 0
    codes = np.where(few, codes * 9 // 15, codes)
    tensors["qweight"] = packers.qserve(codes)
    s2 = np.where(few, 20, rng.integers(1, 15, (OUT, IN // 128)))
    offset = np.where(few, -90, -np.rint(7.5 * s2 + rng.uniform(-7, 7, s2.shape))).astype(int)
    w8 = codes * np.repeat(s2, 128, axis=1) + np.repeat(offset, 128, axis=1)
    assert np.abs(w8).max() <= 127
    tensors["s2_scales"] = packers.s2_columns(s2.T.astype(np.int8), order)
    tensors["s2_zeros"] = packers.s2_columns(offset.T.astype(np.int8), order)
    return tensors, w8 * s1[:, None].astype("f8")


def load(tensors, config=None):
    source = folders.under(PREFIX, tensors)
    found = qserve.QServeFormat.detect(config, source, {})
    return found.linear(source, PREFIX, OUT, IN, False)


@pytest.mark.parametrize("file", ["quant_model.safetensors", "quant_model.pt"])
@pytest.mark.parametrize("name", ["qserve-w8a8", "qserve-w4a8-g128"])
def test_fixture_weights_match_the_golden(tmp_path, name, file):
    shutil.copy(paths.fixture(name) / "config.json", tmp_path)
    if file.endswith(".pt"):
        tensors = folders.read_all(paths.fixture(name) / "quant_model.safetensors")
        torch_writer.save(tensors, tmp_path / file)
    else:
        shutil.copy(paths.fixture(name) / file, tmp_path)
    model = folders.build(open_checkpoint(tmp_path))
    assert folders.check_golden_weights(model, name, atol_ulp=0) == 3


@pytest.mark.parametrize("name", ["qserve-w8a8", "qserve-w4a8-g128"])
def test_recorded_accumulators_and_outputs(name):
    model = folders.build(open_checkpoint(paths.fixture(name)))
    golden = sources.open_file(paths.golden(f"{name}.safetensors"))
    cases = [n.removesuffix(".acc") for n in golden.names() if n.endswith(".acc")]
    assert len(cases) == 4
    for case in cases:
        linear = folders.linear_at(model, case.removeprefix("linear."))
        expected = {
            part: golden.read(f"{case}.{part}") for part in ("x", "x_int8", "x_scale", "acc")
        }
        codes, _ = semantics.runtime(linear)
        acc = semantics.accumulate(jnp.asarray(expected["x_int8"]), codes)
        assert acc.dtype == jnp.int32 and np.array_equal(acc, expected["acc"]), case
        rows = activations.quantize(jnp.asarray(expected["x"]), linear.scheme.activations)
        assert np.array_equal(rows.codes, expected["x_int8"]), case
        out = np.asarray(linear(jnp.asarray(expected["x"]))).astype(np.float32)
        reference = golden.read(f"{case}.out_fp16")
        ulp = np.spacing(np.abs(reference)).astype(np.float32)
        assert np.max(np.abs(out - reference.astype(np.float32)) / ulp) <= 1, case


@pytest.mark.parametrize("grouped", [False, True])
def test_independent_packer(grouped):
    tensors, weight = make(grouped)
    linear = load(tensors)
    assert linear.scheme.name == "w4a8-qoq-s16"
    np.testing.assert_allclose(linear.dequantize(), weight, rtol=3e-7, atol=1e-7)
    packed = qserve.pack_linear(linear, PREFIX)
    assert packed.keys() == {f"{PREFIX}.{part}" for part in tensors}
    for part, expected in tensors.items():
        again = packed[f"{PREFIX}.{part}"]
        assert again.dtype == expected.dtype and np.array_equal(again, expected), part


@pytest.mark.parametrize("name", ["omniserve", "deepcompressor"])
def test_order_is_proven_or_stated(name):
    order = {"omniserve": packers.S2_OMNISERVE, "deepcompressor": packers.S2_DEEPCOMPRESSOR}[name]
    tensors, weight = make(True, order)
    for config in (None, {"quant_method": "qserve", "s2_order": name}):
        linear = load(tensors, config)
        np.testing.assert_allclose(linear.dequantize(), weight, rtol=3e-7, atol=1e-7)


def test_order_that_cannot_be_proven():
    tensors, _ = make(True)
    for part in ("s2_scales", "s2_zeros"):
        tensors[part][:] = 1 if part == "s2_scales" else -8
    with pytest.raises(
        CheckpointError, match=r"s2_scales, s2_zeros: the order .* cannot be proven"
    ):
        load(tensors)
    assert load(tensors, {"quant_method": "qserve", "s2_order": "omniserve"}).zeros is not None
    with pytest.raises(
        CheckpointError, match=r"s2_order='x' is not supported; supported: omniserve"
    ):
        load(tensors, {"quant_method": "qserve", "s2_order": "x"})


def test_both_orders_of_the_fixture_give_the_same_weights(tmp_path):
    source = paths.fixture("qserve-w4a8-g128")
    tensors = folders.read_all(source / "quant_model.safetensors")
    later = tensors | folders.read_all(source / "s2_order_dc_2025-02-20.safetensors")
    assert qserve.prove_order(folders.MemorySource(tensors)) == "omniserve"
    assert qserve.prove_order(folders.MemorySource(later)) == "deepcompressor"
    folder = folders.write(tmp_path / "m", later, None, file="quant_model.safetensors")
    model = folders.build(open_checkpoint(folder))
    folders.check_golden_weights(model, "qserve-w4a8-g128", atol_ulp=0)


def test_stray_file_beside_the_model_is_ignored(tmp_path):
    source = paths.fixture("qserve-w4a8-g128")
    for file in ("quant_model.safetensors", "config.json"):
        shutil.copy(source / file, tmp_path)
    shutil.copy(paths.golden("qserve-w4a8-g128.safetensors"), tmp_path / "golden.safetensors")
    assert open_checkpoint(tmp_path).format == "qserve"


def test_fused_conversion_of_the_reference_system(tmp_path):
    """SpecMQuant's convert_w4a8_qoq_group: q, k, v and gate, up stacked along the outputs."""
    source = paths.fixture("qserve-w4a8-g128")
    tensors = folders.read_all(source / "quant_model.safetensors")
    for layer in range(2):
        for parent, leaves, fused in (
            ("self_attn", ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
            ("mlp", ("gate_proj", "up_proj"), "gate_up_proj"),
        ):
            base = f"model.layers.{layer}.{parent}"
            for part in ("qweight", "s1_scales", "s2_scales", "s2_zeros"):
                pieces = [tensors.pop(f"{base}.{leaf}.{part}") for leaf in leaves]
                axis = 0 if part == "qweight" else -1
                tensors[f"{base}.{fused}.{part}"] = np.concatenate(pieces, axis=axis)
    folder = folders.write(tmp_path / "m", tensors, None, file="quant_model.safetensors")
    converted, plain = (folders.build(open_checkpoint(path)) for path in (folder, source))
    for layer in range(2):
        for leaf in folders.LEAVES:
            parent = "mlp" if leaf in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            prefix = f"model.layers.{layer}.{parent}.{leaf}"
            ours = folders.linear_at(converted, prefix)
            folders.assert_same_linear(ours, folders.linear_at(plain, prefix))


def test_bit_probes():
    """Bytes of the first tile: (low nibble, high nibble) as (n, k)."""
    probes = {
        0: ((0, 0), (16, 0)),
        4: ((8, 0), (24, 0)),
        8: ((0, 16), (16, 16)),
        16: ((0, 4), (16, 4)),
    }
    for byte, positions in probes.items():
        for nibble, (n, k) in enumerate(positions):
            packed = np.zeros(512, np.uint8)
            packed[byte] = 0xF << (4 * nibble)
            codes = marlin.unpack_qserve(packed.view(np.int8).reshape(32, 16))
            assert codes.sum() == 15 and codes[n, k] == 15, (byte, nibble)


def test_damaged_tensors_are_named():
    tensors, _ = make(True)
    for part, message in (
        ("qweight", r"up_proj\.qweight: missing"),
        ("s1_scales", r"up_proj\.s1_scales: missing"),
        ("s2_zeros", r"up_proj\.s2_zeros: missing"),
    ):
        rest = {name: array for name, array in tensors.items() if name != part}
        rest |= {"unrelated.s1_scales": tensors["s1_scales"]}
        with pytest.raises(CheckpointError, match=message):
            load(rest, {"quant_method": "qserve", "s2_order": "omniserve"})


def test_nan_scale_in_a_file_is_named(tmp_path):
    tensors = folders.read_all(paths.fixture("qserve-w8a8") / "quant_model.safetensors")
    tensors["model.layers.1.mlp.up_proj.dequant_scale"][7] = np.inf
    folder = folders.write(tmp_path / "m", tensors, None, file="quant_model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.dequant_scale"):
        folders.build(open_checkpoint(folder))
    assert json.loads((folder / "config.json").read_text()).get("quantization_config") is None
