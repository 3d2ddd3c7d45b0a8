"""AWQ gemm: against GPTQModel's file and an independent packer."""

import jax.numpy as jnp
import numpy as np
import pytest

from specjax.checkpoints import awq, open_checkpoint
from specjax.errors import CheckpointError
from tests import paths
from tests.checkpoints import folders, packers

PREFIX = "model.layers.0.mlp.up_proj"
OUT, IN = 48, 128


def make(group_size: int):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (OUT, IN))
    zeros = rng.integers(0, 16, (OUT, IN // group_size))
    scales = rng.uniform(0.001, 0.02, zeros.shape).astype(np.float16)
    weight = (codes - np.repeat(zeros, group_size, 1)) * np.repeat(scales, group_size, 1).astype(
        "f8"
    )
    tensors = {
        "qweight": packers.awq_words(codes.T),
        "qzeros": packers.awq_words(zeros.T),
        "scales": np.ascontiguousarray(scales.T),
    }
    return tensors, weight


def detect(source, **changes) -> awq.AWQFormat | None:
    base = dict(quant_method="awq", bits=4, group_size=32, version="gemm", zero_point=True)
    return awq.AWQFormat.detect(base | changes, source, {})


def test_fixture_weights_match_the_golden():
    model = folders.build(open_checkpoint(paths.fixture("tiny-awq-g128")))
    assert folders.check_golden_weights(model, "tiny-awq-g128") == 7
    assert model.model.layers[0].mlp.up_proj.scales.dtype == jnp.bfloat16


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_independent_packer(group_size):
    tensors, weight = make(IN if group_size == -1 else group_size)
    source = folders.under(PREFIX, tensors)
    linear = detect(source, group_size=group_size).linear(source, PREFIX, OUT, IN, False)
    assert linear.scheme.name == "w4a16-asym"
    np.testing.assert_allclose(linear.dequantize(), weight, rtol=3e-7, atol=1e-9)


def test_autoawq_configuration_file():
    old = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
    found = awq.AWQFormat.detect(old, folders.MemorySource({}), {})
    assert found == awq.AWQFormat(group_size=128)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"bits": 8}, r"quantization_config\.bits=8 .* supported: 4"),
        ({"version": "gemv"}, r"quantization_config\.version='gemv' .* supported: gemm"),
        ({"zero_point": False}, r"quantization_config\.zero_point=False"),
        ({"group_size": None}, r"quantization_config\.group_size=None"),
    ],
)
def test_unsupported_settings_are_named(changes, message):
    with pytest.raises(CheckpointError, match=message):
        detect(folders.MemorySource({}), **changes)


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_missing_tensor_is_named(part):
    tensors, _ = make(32)
    del tensors[part]
    source = folders.under(PREFIX, tensors)
    with pytest.raises(CheckpointError, match=rf"up_proj\.{part}: missing"):
        detect(source).linear(source, PREFIX, OUT, IN, False)
