"""auto-round: its layouts against the independent packers, settings of single modules, refusals."""

import numpy as np
import pytest

from specjax.checkpoints import autoround, formats
from specjax.errors import CheckpointError
from tests.checkpoints import folders, test_awq, test_gptq

PREFIX = "model.layers.0.self_attn.q_proj"
SETTINGS = dict(quant_method="auto-round", bits=4, group_size=64, sym=True, data_type="int")


def load(tensors, shape=(test_gptq.OUT, test_gptq.IN), **changes):
    source = folders.under(PREFIX, tensors)
    found = formats.detect(SETTINGS | changes, source, {})
    assert isinstance(found, autoround.AutoRoundFormat)
    return found.linear(source, PREFIX, *shape, False)


def without_order(**options):
    tensors, weight = test_gptq.make(**options)
    del tensors["g_idx"]  # auto-round writes none
    return tensors, weight


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(
    "packing, version",
    [
        ("auto_round:auto_gptq", 1),
        ("auto_round:auto_gptq:exllamav2", 1),
        ("auto_round:gptq", 1),
        ("auto_round", 2),
        ("auto_round:gptqmodel", 2),
        ("auto_round:exllamav2", 2),
    ],
)
def test_gptq_layouts(packing, version, sym):
    tensors, weight = without_order(sym=sym, version=version)
    linear = load(tensors, packing_format=packing, sym=sym)
    np.testing.assert_allclose(linear.dequantize(), weight, rtol=3e-7, atol=1e-9)


def test_the_wrong_version_of_zeros_is_recognised():
    tensors, _ = without_order(version=2)
    with pytest.raises(CheckpointError, match=r"qzeros: holds a zero point of 9"):
        load(tensors, packing_format="auto_round:auto_gptq")


def test_awq_layout():
    tensors, weight = test_awq.make(32)
    shape = (test_awq.OUT, test_awq.IN)
    linear = load(tensors, shape, packing_format="auto_round:auto_awq", group_size=32)
    np.testing.assert_allclose(linear.dequantize(), weight, rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize("name", [PREFIX, r".*q_proj", "self_attn"])
def test_settings_of_single_modules(name):
    tensors, weight = without_order(bits=8, group_size=32)
    other = {"model.layers.0": {"bits": 4}} if name == PREFIX else {}
    extra = other | {name: {"bits": 8, "group_size": 32}}
    linear = load(tensors, extra_config=extra)
    np.testing.assert_allclose(linear.dequantize(), weight, rtol=3e-7, atol=1e-9)


def test_dense_modules():
    dense = {"weight": np.ones((test_gptq.OUT, test_gptq.IN), np.float16)}
    assert load(dense) is None
    assert load(dense, extra_config={PREFIX: {"bits": 16, "act_bits": 16}}) is None
    with pytest.raises(CheckpointError, match=r"q_proj\.qweight: is there, but .*extra_config"):
        load(without_order()[0], extra_config={PREFIX: {"bits": 16}})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"packing_format": "auto_round:llm_compressor"}, r"packing_format='auto_round:llm_com"),
        ({"data_type": "mx_fp"}, r"data_type='mx_fp'"),
        ({"act_bits": 8}, r"act_bits=8 .*weights only"),
        ({"bits": 2}, r"bits=2 is not supported; supported: 4, 8"),
        ({"extra_config": {"lm_head": {"bits": 3}}}, r"extra_config\['lm_head'\]\.bits=3"),
        ({"extra_config": {"(": {"bits": 4}}}, r"extra_config\['\('\].*no regular expression"),
        ({"extra_config": [1]}, r"extra_config=\[1\]: expected an object"),
    ],
)
def test_unsupported_settings_are_named(changes, message):
    with pytest.raises(CheckpointError, match=message):
        load({}, **changes)


@pytest.mark.parametrize(
    "rule, message",
    [
        ({"x": {"checkpoint_format": "gptq_v2"}}, r"dynamic\['x'\]\.checkpoint_format='gptq_v2'"),
        ({"x": {"method": "qqq"}}, r"dynamic\['x'\]\.method='qqq'"),
        ({"+:(": {}}, r"dynamic\['\+:\('\].*no regular expression"),
        ({"x": 3}, r"dynamic\['x'\]=3: expected an object"),
        ({"x": {"sym": "no"}}, r"dynamic\['x'\]\.sym='no'"),
    ],
)
def test_dynamic_rules_of_gptqmodel_that_are_not_followed_are_named(rule, message):
    with pytest.raises(CheckpointError, match=message):
        test_gptq.detect(folders.MemorySource({}), dynamic=rule)
