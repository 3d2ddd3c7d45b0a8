"""SpecMQuant's converted checkpoints: against its own output, an independent packer, and bit probes."""

import numpy as np
import pytest

from specjax.checkpoints import formats, marlin, open_checkpoint, specmquant
from specjax.errors import CheckpointError
from tests import paths
from tests.checkpoints import folders, packers

ATTENTION = "model.layers.0.self_attn"
IN = 256


def settings(**changes) -> dict:
    base = dict(quant_method="gptq", bits=4, group_size=128, sym=True, desc_act=False)
    return base | {"checkpoint_format": "gptq"} | changes


@pytest.mark.parametrize(
    "name, count", [("specmquant-w4a16-converted", 7), ("specmquant-qqq-g128-converted", 7)]
)
def test_fixture_weights_match_the_golden(name, count):
    checkpoint = open_checkpoint(paths.fixture(name))
    assert checkpoint.format == "specmquant"
    assert folders.check_golden_weights(folders.build(checkpoint), name) == count


@pytest.mark.parametrize(
    "converted, source",
    [
        ("specmquant-w4a16-converted", "tiny-gptq-g128"),
        ("specmquant-qqq-g128-converted", "tiny-qqq-g128"),
    ],
)
def test_conversion_equals_its_source(converted, source):
    ours, theirs = (folders.build(open_checkpoint(paths.fixture(n))) for n in (converted, source))
    for layer in range(ours.config.num_layers):
        for leaf in folders.LEAVES:
            parent = "mlp" if leaf in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            prefix = f"model.layers.{layer}.{parent}.{leaf}"
            expected = folders.linear_at(theirs, prefix)
            folders.assert_same_linear(folders.linear_at(ours, prefix), expected)


@pytest.mark.parametrize("kv", [64, 32])
@pytest.mark.parametrize("group_size", [128, -1])
def test_marlin_with_independent_packer(group_size, kv):
    """kv = 32 puts k and v into one tile."""
    sizes = {"q_proj": 64, "k_proj": kv, "v_proj": kv}
    rng, total = np.random.default_rng(0), 64 + 2 * kv
    codes = rng.integers(0, 16, (total, IN))
    groups = IN // 128 if group_size == 128 else 1
    scales = rng.uniform(0.001, 0.02, (groups, total)).astype(np.float16)
    permuted = packers.grouped_scales if group_size == 128 else packers.channel_scales
    parts = {"qweight": packers.marlin(codes), "scales": permuted(scales)}
    source = folders.under(f"{ATTENTION}.qkv_proj", parts)
    found = formats.detect(settings(group_size=group_size), source, {})
    weight = (codes - 8) * np.repeat(scales.T.astype(np.float64), IN // groups, axis=1)
    start = 0
    for leaf, size in sizes.items():
        linear = found.linear(source, f"{ATTENTION}.{leaf}", size, IN, False)
        expected = weight[start : start + size]
        np.testing.assert_allclose(linear.dequantize(), expected, rtol=3e-7, atol=1e-9)
        start += size


@pytest.mark.parametrize("kv", [64, 32])
def test_qqq_per_channel_with_independent_packer(kv):
    rng, total = np.random.default_rng(0), 64 + 2 * kv
    codes = rng.integers(-7, 8, (total, IN))
    s_channel = rng.uniform(0.0001, 0.002, (1, total)).astype(np.float32)
    parts = {
        "B": packers.qqq(codes & 15, grouped=False),
        "s_channel": packers.channel_scales(s_channel),
        "s_group": np.zeros((0,), np.float16),
    }
    source = folders.under(f"{ATTENTION}.qkv_proj", parts)
    config = {"quant_method": "qqq", "wbits": 4, "group_size": -1}
    found = formats.detect(config, source, {})
    linear = found.linear(source, f"{ATTENTION}.v_proj", kv, IN, False)
    expected = (16 * codes * s_channel.T.astype(np.float64))[-kv:]
    np.testing.assert_allclose(linear.dequantize(), expected, rtol=3e-7, atol=1e-9)


def test_bit_probes():
    probes = [(0, 0), (8, 0), (0, 8), (8, 8), (1, 0), (9, 0), (1, 8), (9, 8)]
    for nibble, (k, n) in enumerate(probes):
        words = np.zeros((1, 128), np.int32)
        words[0, 0] = np.uint32(0xF << (4 * nibble)).astype(np.int32)
        codes = marlin.unpack_marlin(words)
        assert codes.sum() == 15 and codes[n, k] == 15, nibble


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"group_size": 64}, r"quantization_config\.group_size=64 .* supported: 128, -1"),
        ({"bits": 8}, r"quantization_config\.bits=8"),
        ({"sym": False}, r"quantization_config\.sym=False"),
        ({"desc_act": True}, r"quantization_config\.desc_act=true without static_groups"),
    ],
)
def test_settings_that_a_conversion_loses_are_named(changes, message):
    source = folders.under(f"{ATTENTION}.qkv_proj", {"qweight": np.zeros((16, 256), np.int32)})
    with pytest.raises(CheckpointError, match=message):
        formats.detect(settings(**changes), source, {})


def test_static_groups_keep_the_order():
    source = folders.under(f"{ATTENTION}.qkv_proj", {"qweight": np.zeros((16, 256), np.int32)})
    for static in ({"static_groups": True}, {"meta": {"static_groups": True}}):
        found = formats.detect(settings(desc_act=True, **static), source, {})
        assert isinstance(found, specmquant.SpecMQuantFormat)


def test_damaged_tensors_are_named():
    parts = {"qweight": np.zeros((16, 256), np.int32), "scales": np.ones((2, 128), np.float16)}
    source = folders.under(f"{ATTENTION}.qkv_proj", parts)
    found = formats.detect(settings(), source, {})
    with pytest.raises(CheckpointError, match=r"qkv_proj\.scales: has 128 outputs, too few"):
        found.linear(source, f"{ATTENTION}.k_proj", 128, IN, False)
    with pytest.raises(CheckpointError, match=r"o_proj\.scales: missing"):
        found.linear(source, f"{ATTENTION}.o_proj", 64, IN, False)
    with pytest.raises(CheckpointError, match=r"q_proj\.bias: missing, because"):
        found.linear(source, f"{ATTENTION}.q_proj", 64, IN, True)
