"""GPTQ: against GPTQModel's files, an independent packer, and damaged input."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from specjax.checkpoints import gptq, open_checkpoint
from specjax.errors import CheckpointError, SpecjaxError
from tests import paths
from tests.checkpoints import folders, packers

PREFIX = "model.layers.0.self_attn.q_proj"
OUT, IN = 48, 256


def settings(**changes) -> dict:
    base = dict(quant_method="gptq", bits=4, group_size=64, sym=True, desc_act=False)
    return base | {"checkpoint_format": "gptq"} | changes


def detect(source, **changes) -> gptq.GPTQFormat:
    return gptq.GPTQFormat.detect(settings(**changes), source, {})


def make(bits=4, group_size=64, sym=True, version=1, g_idx=None, seed=0):
    """Tensors of one linear, and its weight in float64."""
    rng = np.random.default_rng(seed)
    groups = IN // group_size
    codes = rng.integers(0, 2**bits, (OUT, IN))
    zeros = np.full((OUT, groups), 2 ** (bits - 1))
    if not sym:
        zeros = rng.integers(0, 2**bits, zeros.shape)
    scales = rng.uniform(0.001, 0.02, zeros.shape).astype(np.float16)
    g_idx = np.arange(IN) // group_size if g_idx is None else g_idx
    weight = (codes - zeros[:, g_idx]) * scales.astype(np.float64)[:, g_idx]
    return packers.gptq(codes, zeros, scales, g_idx, bits=bits, version=version), weight


@pytest.mark.parametrize("name", ["tiny-gptq-g128", "tiny-gptq-actorder"])
def test_fixture_weights_match_the_golden(name):
    model = folders.build(open_checkpoint(paths.fixture(name)))
    assert folders.check_golden_weights(model, name) == 7
    assert model.model.layers[0].mlp.down_proj.perm is None
    assert model.lm_head.weight.dtype == jnp.float32  # the file's bfloat16 scales nothing


@pytest.mark.parametrize(
    "bits, group_size, sym, version",
    list(itertools.product([4, 8], [32, 64, 128, -1], [True, False], [1, 2])),
)
def test_independent_packer(bits, group_size, sym, version):
    tensors, weight = make(bits, IN if group_size == -1 else group_size, sym, version)
    source = folders.under(PREFIX, tensors)
    layout = "gptq" if version == 1 else "gptq_v2"
    found = detect(source, bits=bits, group_size=group_size, sym=sym, checkpoint_format=layout)
    linear = found.linear(source, PREFIX, OUT, IN, False)
    assert linear.scheme.name == f"w{bits}a16" + ("" if sym else "-asym")
    assert linear.scales.dtype == jnp.float16
    np.testing.assert_allclose(linear.dequantize(), weight, rtol=3e-7, atol=1e-9)


def test_version_1_zero_point_of_zero_borrows_from_its_neighbour():
    # GPTQModel subtracts 0x11111111 from the whole word: zeros 3, 0, 5, ... become nibbles 2, f, 3, ...
    zeros = np.array([[3], [0], [5], [8], [8], [8], [8], [8]], np.uint8)
    words = gptq.pack_zeros(zeros, 4, version=1)
    assert words.view(np.uint32)[0, 0] == 0x88888503 - 0x11111111
    assert np.array_equal(gptq.unpack_zeros(words, 4, version=1), zeros)


@pytest.mark.parametrize("sym", [True, False])
def test_act_order_without_static_groups(sym):
    g_idx = np.random.default_rng(1).permutation(IN) // 64
    tensors, weight = make(sym=sym, g_idx=g_idx)
    source = folders.under(PREFIX, tensors)
    linear = detect(source, sym=sym, desc_act=True).linear(source, PREFIX, OUT, IN, False)
    assert np.array_equal(g_idx[np.asarray(linear.perm)], np.arange(IN) // 64)
    np.testing.assert_allclose(linear.dequantize(), weight, rtol=3e-7, atol=1e-9)
    x = np.random.default_rng(2).normal(size=(3, IN)).astype(np.float32)
    np.testing.assert_allclose(linear(jnp.asarray(x)), x @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "bits, sym, act_order", list(itertools.product([4, 8], [True, False], [False, True]))
)
def test_packing_again_gives_the_same_tensors(bits, sym, act_order):
    g_idx = np.random.default_rng(1).permutation(IN) // 64 if act_order else None
    tensors, _ = make(bits=bits, sym=sym, g_idx=g_idx)
    source = folders.under(PREFIX, tensors)
    linear = detect(source, bits=bits, sym=sym).linear(source, PREFIX, OUT, IN, False)
    packed = gptq.pack_linear(linear, PREFIX)
    assert packed.keys() == {f"{PREFIX}.{part}" for part in tensors}
    for part, expected in tensors.items():
        found = packed[f"{PREFIX}.{part}"]
        assert found.dtype == expected.dtype and np.array_equal(found, expected), part


def test_bias_is_kept_or_refused():
    tensors, _ = make()
    bias = np.linspace(-1, 1, OUT).astype(np.float16)
    source = folders.under(PREFIX, {**tensors, "bias": bias})
    linear = detect(source).linear(source, PREFIX, OUT, IN, True)
    assert np.array_equal(linear.bias, bias)
    with pytest.raises(CheckpointError, match=r"q_proj\.bias: not zero"):
        detect(source).linear(source, PREFIX, OUT, IN, False)
    source = folders.under(PREFIX, {**tensors, "bias": 0 * bias})
    assert detect(source).linear(source, PREFIX, OUT, IN, False).bias is None
    source = folders.under(PREFIX, tensors)
    with pytest.raises(CheckpointError, match=r"q_proj\.bias: missing"):
        detect(source).linear(source, PREFIX, OUT, IN, True)


def test_dense_linears_and_per_module_settings():
    tensors, weight = make(bits=8, group_size=32)
    source = folders.under(PREFIX, tensors)
    dynamic = {r"+:.*\.q_proj": {"bits": 8, "group_size": 32}, r"-:.*\.o_proj": {}}
    found = detect(source, dynamic=dynamic)
    linear = found.linear(source, PREFIX, OUT, IN, False)
    np.testing.assert_allclose(linear.dequantize(), weight, rtol=3e-7, atol=1e-9)
    with pytest.raises(CheckpointError, match="o_proj is not quantized"):
        found.linear(source, "model.layers.0.self_attn.o_proj", OUT, IN, False)
    dense = folders.under(PREFIX, {"weight": weight.astype(np.float16)})
    assert found.linear(dense, PREFIX, OUT, IN, False) is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"bits": 3}, r"quantization_config\.bits=3 .* 4, 8"),
        ({"bits": None}, r"quantization_config\.bits=None"),
        ({"group_size": 0}, r"quantization_config\.group_size=0"),
        ({"group_size": "128"}, r"quantization_config\.group_size='128'"),
        ({"checkpoint_format": "marlin"}, r"checkpoint_format='marlin' .* gptq, gptq_v2"),
        ({"pack_dtype": "int64"}, r"pack_dtype='int64'"),
        ({"dynamic": {"x": {"bits": 2}}}, r"dynamic\['x'\]\.bits=2"),
    ],
)
def test_unsupported_settings_are_named(changes, message):
    with pytest.raises(CheckpointError, match=message):
        detect(folders.MemorySource({}), **changes)


def damaged(part: str, change) -> folders.MemorySource:
    tensors, _ = make()
    tensors[part] = change(tensors[part])
    return folders.under(PREFIX, {k: v for k, v in tensors.items() if v is not None})


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("scales", lambda a: None, r"q_proj\.scales: missing"),
        ("qweight", lambda a: a[:-1], r"q_proj\.qweight: shape is \[31, 48\], expected \[32, 48\]"),
        ("qweight", lambda a: a.view(np.uint32), r"q_proj\.qweight: dtype is uint32"),
        ("scales", lambda a: a[:2], r"q_proj\.scales: shape is \[2, 48\], expected \[4, 48\]"),
        ("g_idx", lambda a: a[:-1], r"q_proj\.g_idx: shape is \[255\], expected \[256\]"),
        ("g_idx", lambda a: a + 1, r"q_proj\.g_idx: holds group 4, .* groups 0\.\.3"),
        ("g_idx", lambda a: a - 1, r"q_proj\.g_idx: holds group -1"),
        ("g_idx", lambda a: a // 2, r"q_proj\.g_idx: group 0 has 128 channels"),
        ("qzeros", lambda a: a + 1, r"q_proj\.qzeros: holds a zero point of 9, .*sym=true needs 8"),
    ],
)
def test_damaged_tensors_are_named(part, change, message):
    source = damaged(part, change)
    with pytest.raises(CheckpointError, match=message):
        detect(source).linear(source, PREFIX, OUT, IN, False)


def test_wrong_version_is_recognised_for_symmetric_files():
    tensors, _ = make(version=2)
    source = folders.under(PREFIX, tensors)
    with pytest.raises(CheckpointError, match='checkpoint_format is probably "gptq_v2"'):
        detect(source).linear(source, PREFIX, OUT, IN, False)


def test_act_order_needs_its_indices():
    source = damaged("g_idx", lambda a: None)
    with pytest.raises(CheckpointError, match=r"q_proj\.g_idx: missing, but .*desc_act=true"):
        detect(source, desc_act=True).linear(source, PREFIX, OUT, IN, False)
    assert detect(source, desc_act=True, static_groups=True).linear(source, PREFIX, OUT, IN, False)


def test_group_size_that_does_not_divide():
    source = damaged("scales", lambda a: a)
    with pytest.raises(
        SpecjaxError, match=r"q_proj: group_size=96 does not divide in_features=256"
    ):
        detect(source, group_size=96).linear(source, PREFIX, OUT, IN, False)


def test_nan_scale_in_a_file_is_named(tmp_path):
    tensors = folders.read_all(paths.fixture("tiny-gptq-g128") / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.scales"][1, 3] = np.nan
    folder = folders.write(tmp_path / "m", tensors, settings(group_size=128))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.scales"):
        folders.build(open_checkpoint(folder))


def test_configuration_in_its_own_file(tmp_path):
    """Old AutoGPTQ: quantize_config.json alone, which does not name its method."""
    tensors = folders.read_all(paths.fixture("tiny-gptq-g128") / "model.safetensors")
    folder = folders.write(tmp_path / "m", tensors, None)
    old = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, "damp_percent": 0.01}
    (folder / "quantize_config.json").write_text(json.dumps(old))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format == "gptq"
    folders.check_golden_weights(folders.build(checkpoint), "tiny-gptq-g128")


def test_quantized_tensors_without_any_configuration(tmp_path):
    tensors = folders.read_all(paths.fixture("tiny-gptq-g128") / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is quantized, but neither config\.json"):
        open_checkpoint(folders.write(tmp_path / "m", tensors, None))


def test_unknown_method(tmp_path):
    folder = folders.write(tmp_path / "m", folders.tiny_tensors(), {"quant_method": "hqq"})
    with pytest.raises(CheckpointError, match=r"quant_method='hqq' is not supported; supported: "):
        open_checkpoint(folder)
