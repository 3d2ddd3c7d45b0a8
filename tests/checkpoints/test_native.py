"""specjax's own format: every scheme comes back bit for bit; damaged folders are refused."""

import json

import numpy as np
import pytest

from specjax.checkpoints import export, native, open_checkpoint
from specjax.errors import CheckpointError
from specjax.quant import scheme as schemes
from tests import paths
from tests.checkpoints import folders
from tests.quant import random_linears

PREFIX = "model.layers.0.mlp.up_proj"
OUT, IN = 24, 64


def round_trip(linear):
    source = folders.MemorySource(native.pack_linear(linear, PREFIX))
    config = json.loads(json.dumps(native.quantization_config({PREFIX: linear})))
    found = native.SpecjaxFormat.detect(config, source, {})
    return found.linear(source, PREFIX, OUT, linear.in_features, linear.bias is not None), source


@pytest.mark.parametrize("name", sorted(schemes.SCHEMES))
@pytest.mark.parametrize("group_size", [32, IN])
def test_every_scheme(name, group_size):
    scheme = schemes.SCHEMES[name]
    options = [{}, {"bias": True, "perm": True}]
    levels = scheme.weights.levels
    if not scheme.weights.symmetric and (levels == "single" or group_size == IN):
        options.append({"minima": True})
    for extra in options:
        linear = random_linears.make(scheme, OUT, IN, group_size, **extra)
        folders.assert_same_linear(round_trip(linear)[0], linear)


def test_four_bit_codes_take_half_a_byte_and_may_be_odd_in_number():
    linear = random_linears.make(schemes.lookup("w4a16"), OUT, 63, 63)
    again, source = round_trip(linear)
    assert source.shape(f"{PREFIX}.codes") == (OUT, 32)
    folders.assert_same_linear(again, linear)


@pytest.fixture
def exported(tmp_path):
    checkpoint = open_checkpoint(paths.fixture("tiny-gptq-g128"))
    model = folders.build(checkpoint)
    return export.export(model, checkpoint.config, tmp_path / "out", format="specjax")


def test_changed_configuration_is_refused(exported):
    config = json.loads((exported / "config.json").read_text())

    def refused(message, **changes):
        changed = config | {"quantization_config": config["quantization_config"] | changes}
        (exported / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=message):
            folders.build(open_checkpoint(exported))

    linears = config["quantization_config"]["linears"]
    refused(r"format_version=2 is not supported; supported: 1", format_version=2)
    refused(r"linears\['x'\]=.*scheme='w5' is unknown", linears={"x": {"scheme": "w5"}})
    other = linears | {"model.layers.7.mlp.up_proj": {"scheme": "w4a16", "group_size": 128}}
    refused(r"layers\.7\.mlp\.up_proj\.codes: missing", linears=other)
    other = {prefix: entry | {"group_size": 64} for prefix, entry in linears.items()}
    refused(r"q_proj\.scales: shape is \[256, 2\], expected \[256, 4\]", linears=other)


def test_missing_and_mistyped_tensors_are_named():
    linear = random_linears.make(schemes.lookup("w4a16-asym"), OUT, IN, 32)
    packed = native.pack_linear(linear, PREFIX)
    config = native.quantization_config({PREFIX: linear})

    def load(tensors):
        source = folders.MemorySource(tensors)
        found = native.SpecjaxFormat.detect(config, source, {})
        return found.linear(source, PREFIX, OUT, IN, False)

    for part in ("codes", "scales"):
        rest = {name: a for name, a in packed.items() if name != f"{PREFIX}.{part}"}
        with pytest.raises(CheckpointError, match=rf"up_proj\.{part}: missing"):
            load(rest)
    changed = packed | {f"{PREFIX}.scales": packed[f"{PREFIX}.scales"].astype(np.float64)}
    with pytest.raises(CheckpointError, match=r"up_proj\.scales: dtype is float64"):
        load(changed)
    with pytest.raises(CheckpointError, match=r"up_proj\.bias: present"):
        load(packed | {f"{PREFIX}.bias": np.zeros((OUT,), np.float16)})
