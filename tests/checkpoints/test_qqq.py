"""QQQ: against GPTQModel's files, an independent packer, bit probes, and damaged input."""

import numpy as np
import pytest

from specjax.checkpoints import marlin, open_checkpoint, qqq
from specjax.errors import CheckpointError
from tests import paths
from tests.checkpoints import folders, packers

PREFIX = "model.layers.0.mlp.gate_proj"
OUT, IN = 128, 256

# (k, n) of the nibbles of the first word, lowest first.
PROBES = {
    False: [(0, 8), (0, 0), (1, 8), (1, 0), (2, 8), (2, 0), (3, 8), (3, 0)],
    True: [(0, 0), (2, 0), (0, 8), (2, 8), (1, 0), (3, 0), (1, 8), (3, 8)],
}


def settings(grouped: bool, **changes) -> dict:
    size = 128 if grouped else -1
    return {"quant_method": "qqq", "wbits": 4, "group_size": size} | changes


def make(grouped: bool):
    """Tensors of one linear, and its weight in float64."""
    rng = np.random.default_rng(0)
    s_channel = rng.uniform(0.0001, 0.002, (1, OUT)).astype(np.float32)
    tensors = {"s_channel": packers.channel_scales(s_channel)}
    if grouped:
        codes = rng.integers(0, 16, (OUT, IN))
        s_group = rng.uniform(2, 19, (IN // 128, OUT)).astype(np.float16)
        exact = (codes - 8) * np.repeat(s_group.T.astype(np.float64), 128, axis=1)
        w8 = np.clip(np.rint(exact), -128, 127)
        tensors["s_group"] = packers.grouped_scales(s_group)
        tensors["B"] = packers.qqq(codes, grouped=True)
    else:
        codes = rng.integers(-7, 8, (OUT, IN))
        w8 = 16 * codes
        tensors["s_group"] = np.zeros((0,), np.float16)
        tensors["B"] = packers.qqq(codes & 15, grouped=False)
    return tensors, w8 * s_channel.T.astype(np.float64)


@pytest.mark.parametrize("name", ["tiny-qqq", "tiny-qqq-g128"])
def test_fixture_weights_match_the_golden(name):
    model = folders.build(open_checkpoint(paths.fixture(name)))
    assert folders.check_golden_weights(model, name) == 7


@pytest.mark.parametrize("grouped", [False, True])
def test_independent_packer(grouped):
    tensors, weight = make(grouped)
    source = folders.under(PREFIX, tensors)
    found = qqq.QQQFormat.detect(settings(grouped), source, {})
    linear = found.linear(source, PREFIX, OUT, IN, False)
    assert linear.scheme.name == "w4a8-qqq" and linear.group_size == (128 if grouped else IN)
    np.testing.assert_allclose(linear.dequantize(), weight, rtol=3e-7, atol=1e-9)
    packed = qqq.pack_linear(linear, PREFIX)
    for part, expected in tensors.items():
        again = packed[f"{PREFIX}.{part}"]
        assert again.dtype == expected.dtype and np.array_equal(again, expected), part


@pytest.mark.parametrize("grouped", [False, True])
def test_bit_probes(grouped):
    for nibble, (k, n) in enumerate(PROBES[grouped]):
        words = np.zeros((1, 128), np.int32)
        words[0, 0] = np.uint32(0xF << (4 * nibble)).astype(np.int32)
        codes = marlin.unpack_qqq(words, grouped)
        assert codes.sum() == 15 and codes[n, k] == 15, nibble


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"wbits": 8}, r"quantization_config\.wbits=8 .* supported: 4"),
        ({"group_size": 64}, r"quantization_config\.group_size=64 .* supported: -1, 128"),
    ],
)
def test_unsupported_settings_are_named(changes, message):
    with pytest.raises(CheckpointError, match=message):
        qqq.QQQFormat.detect(settings(True, **changes), folders.MemorySource({}), {})


def test_group_size_that_contradicts_the_tensors():
    for grouped, message in ((True, r"s_group: has shape \[2, 128\]"), (False, r"s_group: shape")):
        source = folders.under(PREFIX, make(grouped)[0])
        found = qqq.QQQFormat.detect(settings(not grouped), source, {})
        with pytest.raises(CheckpointError, match=message):
            found.linear(source, PREFIX, OUT, IN, False)


def test_damaged_tensors_are_named():
    tensors, _ = make(True)
    found = qqq.QQQFormat.detect(settings(True), folders.MemorySource({}), {})
    for part in tensors:
        rest = {name: array for name, array in tensors.items() if name != part}
        with pytest.raises(CheckpointError, match=rf"gate_proj\.{part}: missing"):
            found.linear(folders.under(PREFIX, rest), PREFIX, OUT, IN, False)
    with pytest.raises(CheckpointError, match="out_features=96 is not a multiple of 64"):
        found.linear(folders.under(PREFIX, tensors), PREFIX, 96, IN, False)
