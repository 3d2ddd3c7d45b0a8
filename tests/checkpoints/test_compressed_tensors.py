"""compressed-tensors: against llm-compressor's files, an independent packer, and damaged input."""

import itertools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from specjax.checkpoints import compressed_tensors as ct
from specjax.checkpoints import open_checkpoint
from specjax.errors import CheckpointError
from specjax.files import source as sources
from specjax.models import llama
from tests import paths
from tests.checkpoints import folders, packers

PREFIX = "model.layers.0.self_attn.v_proj"
OUT, IN = 40, 128

TOKEN = dict(num_bits=8, type="int", strategy="token", dynamic=True, symmetric=True)


def settings(weights: dict, activations=None, layout="pack-quantized", **changes) -> dict:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    base = {"quant_method": "compressed-tensors", "format": layout, "ignore": ["lm_head"]}
    return base | {"config_groups": {"group_0": group}} | changes


def weights(bits=4, group_size=32, symmetric=True, **changes) -> dict:
    strategy = "channel" if group_size is None else "group"
    base = dict(num_bits=bits, type="int", strategy=strategy, group_size=group_size)
    return base | dict(symmetric=symmetric, actorder=None) | changes


def make(bits: int, group_size: int | None, symmetric: bool, packed: bool, g_idx=None, seed=0):
    """Tensors of one linear, and its weight in float64. Codes and zeros are signed, as the tool has them in memory."""
    rng = np.random.default_rng(seed)
    half, groups = 2 ** (bits - 1), 1 if group_size is None else IN // group_size
    codes = rng.integers(-half, half, (OUT, IN))
    zeros = rng.integers(-half, half, (OUT, groups))
    zeros = 0 * zeros if symmetric else zeros
    scales = rng.uniform(0.001, 0.02, zeros.shape).astype(np.float32)
    index = np.arange(IN) * groups // IN if g_idx is None else g_idx
    tensors = {"weight_scale": scales}
    if packed:
        tensors["weight_packed"] = packers.into_words(codes + half, bits, axis=1)
        tensors["weight_shape"] = np.array([OUT, IN])
    else:
        tensors["weight"] = codes.astype(np.int8)
    if not symmetric:
        tensors["weight_zero_point"] = (
            packers.into_words(zeros + half, bits, axis=0) if packed else zeros.astype(np.int8)
        )
    if g_idx is not None:
        tensors["weight_g_idx"] = g_idx.astype(np.int32)
    return tensors, (codes - zeros[:, index]) * scales.astype(np.float64)[:, index]


def load(tensors, config):
    source = folders.under(PREFIX, tensors)
    found = ct.CompressedTensorsFormat.detect(config, source, {})
    return found.linear(source, PREFIX, OUT, IN, False)


def golden_errors(name: str) -> np.ndarray:
    """Relative RMS error of the logits of each position against the library's own model."""
    model = folders.build(open_checkpoint(paths.fixture(name)))
    golden = sources.open_file(paths.golden(f"{name}.safetensors"))
    logits = llama.full_logits(model, jnp.asarray(golden.read("input_ids")))
    expected = golden.read("logits")
    return np.sqrt(((logits - expected) ** 2).mean(-1) / (expected**2).mean(-1)).ravel()


def test_fixtures_give_the_golden_logits():
    assert golden_errors("tiny-ct-w4a16").max() < 1e-5


def test_int8_activations_give_the_golden_logits():
    """The library multiplies floats: noise of 1e-7 moves a code here and there, and positions after it by 1e-3."""
    errors = golden_errors("tiny-ct-w8a8-sq")
    assert np.median(errors) < 1e-6
    assert np.sqrt(np.mean(errors**2)) < 1.5e-3


def test_int8_activations_are_multiplied_as_the_library_does():
    """`fake_quantize` of compressed-tensors 0.20 in float32, then a float product; row maxima of both signs."""
    tensors, weight = make(8, None, True, packed=False)
    linear = load(tensors, settings(weights(8, None), TOKEN, "int-quantized"))
    x = np.random.default_rng(1).standard_normal((500, IN)).astype(np.float32)
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127.5)
    rounded = (np.rint(np.clip(x / scale, -128, 127)) * scale).astype(np.float64)
    error = np.abs(linear(jnp.asarray(x)) - rounded @ weight.T).max(-1)
    assert error.max() < 1e-5 * np.abs(rounded @ weight.T).max()


@pytest.mark.parametrize(
    "bits, group_size, symmetric", list(itertools.product([4, 8], [32, 128, None], [True, False]))
)
def test_packed_weight_only(bits, group_size, symmetric):
    tensors, weight = make(bits, group_size, symmetric, packed=True)
    linear = load(tensors, settings(weights(bits, group_size, symmetric)))
    assert linear.scheme.name == f"w{bits}a16" + ("" if symmetric else "-asym")
    assert linear.scales.dtype == jnp.float32
    np.testing.assert_allclose(linear.dequantize(), weight, rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
def test_act_order_by_groups(symmetric):
    g_idx = np.random.default_rng(3).permutation(IN) // 32
    tensors, weight = make(4, 32, symmetric, packed=True, g_idx=g_idx)
    config = settings(weights(symmetric=symmetric, actorder="group"))
    np.testing.assert_allclose(load(tensors, config).dequantize(), weight, rtol=3e-7, atol=1e-9)
    del tensors["weight_g_idx"]
    with pytest.raises(CheckpointError, match=r"v_proj\.weight_g_idx: missing"):
        load(tensors, config)


@pytest.mark.parametrize(
    "bits, group_size, symmetric, name",
    [
        (8, None, True, "w8a8-full"),
        (4, None, True, "w4a8-full"),
        (4, 32, True, "w4a8-full"),
        (4, 32, False, "w4a8-asym-full"),
    ],
)
def test_integers_with_quantized_activations(bits, group_size, symmetric, name):
    tensors, weight = make(bits, group_size, symmetric, packed=False)
    config = settings(weights(bits, group_size, symmetric), TOKEN, "int-quantized")
    linear = load(tensors, config)
    assert linear.scheme.name == name
    np.testing.assert_allclose(linear.dequantize(), weight, rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize("activations", [None, TOKEN | {"type": "float"}])
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_fp8(activations, strategy):
    rng = np.random.default_rng(0)
    codes = rng.normal(0, 100, (OUT, IN)).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(0.001, 0.02, (OUT, 1) if strategy == "channel" else (1,)).astype("f4")
    kind = weights(8, None, type="float", strategy=strategy)
    tensors = {"weight": codes, "weight_scale": scales}
    linear = load(tensors, settings(kind, activations, "float-quantized"))
    assert linear.scheme.name == ("fp8" if activations else "fp8-a16")
    assert np.array_equal(linear.dequantize(), codes.astype(np.float32) * scales.reshape(-1, 1))


@pytest.mark.parametrize("symmetric", [True, False])
def test_features_that_do_not_fill_the_last_word(symmetric):
    """Codes are padded along the inputs, zeros along the outputs."""
    rng = np.random.default_rng(0)
    codes, zeros = rng.integers(0, 16, (12, 20)), rng.integers(0, 16, (12, 1))
    zeros = np.full_like(zeros, 8) if symmetric else zeros
    scales = rng.uniform(0.001, 0.02, (12, 1)).astype(np.float32)
    tensors = {
        "weight_packed": packers.into_words(np.pad(codes, ((0, 0), (0, 4))), 4, axis=1),
        "weight_shape": np.array([12, 20]),
        "weight_scale": scales,
        "weight_zero_point": packers.into_words(np.pad(zeros, ((0, 4), (0, 0))), 4, axis=0),
    }
    source = folders.under(PREFIX, tensors)
    config = settings(weights(4, None, symmetric))
    found = ct.CompressedTensorsFormat.detect(config, source, {})
    linear = found.linear(source, PREFIX, 12, 20, False)
    np.testing.assert_allclose(linear.dequantize(), (codes - zeros) * scales, rtol=3e-7)
    packed = ct.pack_linear(linear, PREFIX)
    for part in tensors if not symmetric else ["weight_packed", "weight_shape"]:
        assert np.array_equal(packed[f"{PREFIX}.{part}"], tensors[part]), part


def test_groups_by_target_and_ignored_modules():
    config = settings(weights(4, 32))
    config["config_groups"]["first"] = {
        "targets": [r"re:.*v_proj", "model.layers.0.mlp.down_proj"],
        "weights": weights(8, None),
        "format": "int-quantized",
        "input_activations": TOKEN,
    }
    config["ignore"] = [r"re:.*lm_head", "model.layers.1.self_attn.v_proj"]
    found = ct.CompressedTensorsFormat.detect(config, folders.MemorySource({}), {})
    schemes = {
        PREFIX: "w8a8-full",
        "model.layers.0.mlp.down_proj": "w8a8-full",
        "model.layers.0.mlp.up_proj": "w4a16",
        "model.layers.1.self_attn.v_proj": None,
        "lm_head": None,
    }
    for prefix, name in schemes.items():
        group = found._group(prefix)
        assert (None if group is None else group.scheme.name) == name, prefix
    source = folders.under("lm_head", {"weight": np.zeros((4, 4), np.float16)})
    assert found.linear(source, "lm_head", 4, 4, False) is None


@pytest.mark.parametrize(
    "config, message",
    [
        (settings(weights(3)), r"group_0\.weights\.num_bits=3 .* 4, 8"),
        (settings(weights(strategy="block")), r"group_0\.weights\.strategy='block'"),
        (settings(weights(), layout="marlin-24"), r"group_0\.format='marlin-24'"),
        (settings(weights(), TOKEN | {"dynamic": False}), r"input_activations\.dynamic=False"),
        (settings(weights(), TOKEN | {"strategy": "tensor"}), r"input_activations\.strategy"),
        (settings(weights(), TOKEN | {"type": "float"}), r"input_activations\.type='float'"),
        (settings(weights(8, None, False), TOKEN), r"weights\.symmetric=false"),
        (settings(weights(), sparsity_config={"format": "sparse-24"}), r"sparsity_config=.*24"),
        (settings(weights(), transform_config={"config_groups": {"u": {}}}), r"transform_config="),
        (settings(weights(), config_groups={}), r"config_groups=\{\} holds no group"),
    ],
)
def test_unsupported_settings_are_named(config, message):
    with pytest.raises(CheckpointError, match=message):
        ct.CompressedTensorsFormat.detect(config, folders.MemorySource({}), {})


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("weight_packed", lambda a: None, r"v_proj\.weight_packed: missing"),
        (
            "weight_scale",
            lambda a: a[:, :1],
            r"v_proj\.weight_scale: shape is \[40, 1\], .*\[40, 4\]",
        ),
        ("weight_shape", lambda a: a[::-1], r"v_proj\.weight_shape: says \[128, 40\]"),
        ("weight_zero_point", lambda a: None, r"v_proj\.weight_zero_point: missing"),
    ],
)
def test_damaged_tensors_are_named(part, change, message):
    tensors, _ = make(4, 32, False, packed=True)
    tensors[part] = change(tensors[part])
    tensors = {name: array for name, array in tensors.items() if array is not None}
    with pytest.raises(CheckpointError, match=message):
        load(tensors, settings(weights(symmetric=False)))


def test_codes_out_of_range_and_uncompressed_weights():
    tensors, _ = make(8, None, True, packed=False)
    with pytest.raises(CheckpointError, match=r"v_proj\.weight: holds -128, but num_bits=4"):
        load(tensors, settings(weights(4, None), TOKEN, "int-quantized"))
    dense = {"weight": np.zeros((OUT, IN), np.float32)}
    with pytest.raises(CheckpointError, match=r"v_proj\.weight: holds floating-point weights"):
        load(dense, settings(weights(8, None), TOKEN, "int-quantized"))


@pytest.mark.parametrize(
    "bits, group_size, symmetric, packed, act_order",
    [
        (4, 32, True, True, False),
        (4, 32, False, True, True),
        (8, None, False, True, False),
        (8, None, True, False, False),
        (4, 32, False, False, False),
        (4, 32, True, False, False),
    ],
)
def test_packing_again_gives_the_same_tensors(bits, group_size, symmetric, packed, act_order):
    g_idx = np.random.default_rng(3).permutation(IN) // 32 if act_order else None
    tensors, _ = make(bits, group_size, symmetric, packed, g_idx)
    layout, activations = ("pack-quantized", None) if packed else ("int-quantized", TOKEN)
    actorder = "group" if act_order else None
    kind = weights(bits, group_size, symmetric, actorder=actorder)
    linear = load(tensors, settings(kind, activations, layout))
    again = ct.pack_linear(linear, PREFIX)
    assert again.keys() == {f"{PREFIX}.{part}" for part in tensors}
    for part, expected in tensors.items():
        found = again[f"{PREFIX}.{part}"]
        assert found.dtype == expected.dtype and np.array_equal(found, expected), part
    written = ct.quantization_config({PREFIX: linear})
    source = folders.MemorySource(again)
    reread = ct.CompressedTensorsFormat.detect(written, source, {})
    folders.assert_same_linear(reread.linear(source, PREFIX, OUT, IN, False), linear)
