"""Conversions end to end through the binary: quantize, write, read back; refusals before any
work.
"""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import convert as binary
from experiments.shared import common
from specjax import checkpoints, conversion
from specjax.errors import CheckpointError, ConfigError
from specjax.files import manifest
from specjax.models import llama
from specjax.quant import rotation
from specjax.quant.linear import QuantizedLinear
from specjax.quantize import layerwise, selfcheck
from specjax.text import tokenizer
from tests import paths


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Calibration text of a few hundred tokens."""
    path = tmp_path_factory.mktemp("text") / "calibration.jsonl"
    rows = [
        json.dumps({"text": f"The price of item {i} is {i * i} dollars, and it weighs {i} pounds."})
        for i in range(60)
    ]
    path.write_text("\n".join(rows))
    return path


def convert(output, *arguments, source="tiny-fp16"):
    flags = [f"--source={paths.fixture(source)}", f"--output={output}", *arguments]
    return common.guarded(binary.main, common.parse(binary.define_flags, flags))


def names(folder):
    checkpoint = checkpoints.open_checkpoint(folder)
    model = llama.build(checkpoint, jnp.float32)
    layers = model.model.layers
    linears = [x for layer in layers for x in layerwise.linears(layer).values()]
    return checkpoint.format, {
        x.scheme.name if isinstance(x, QuantizedLinear) else "dense" for x in linears
    }


CALIBRATED = ("--calibration_samples=8", "--calibration_tokens=64")
CASES = {
    "gptq": ("--format=gptq --scheme=w4a16 --group_size=64 --method=gptq", "w4a16"),
    "gptq asym": ("--format=gptq --scheme=w4a16 --nosymmetric --group_size=32", "w4a16-asym"),
    "smoothquant": ("--format=compressed-tensors --scheme=w8a8 --method=smoothquant", "w8a8-full"),
    "qqq": ("--format=qqq --scheme=w4a8-qqq --rotate --method=gptq", "w4a8-qqq"),
    "qoq": ("--format=qserve --scheme=w4a8-qoq --method=qoq", "w4a8-qoq-s16"),
    "w4a4": ("--format=specjax --scheme=w4a4 --rotate --method=rtn", "w4a4"),
    "fp8": ("--format=compressed-tensors --scheme=fp8 --method=rtn", "fp8"),
    "fp4": ("--format=specjax --scheme=fp4 --group_size=32 --method=rtn", "fp4"),
    "dense": ("--format=dense --rotate", "dense"),
}
# What these write is written, read and compared in the tests of their formats, too.
SLOW = ("gptq", "gptq asym", "qqq", "qoq", "w4a4", "fp4")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES]
)
def test_quantizes_writes_and_reads_back(case, tmp_path, text, capsys):
    arguments, scheme = CASES[case]
    output = tmp_path / "out"
    assert convert(output, *arguments.split(), *CALIBRATED, f"--calibration_file={text}") == 0
    printed = capsys.readouterr().out
    assert "reloaded: relative RMS error of the logits 0.00e+00" in printed
    found_format, schemes = names(output)
    assert schemes == {scheme}
    assert found_format == arguments.split("--format=")[1].split()[0].replace("dense", "hf")
    assert (manifest.read(output)["rotation"] is not None) == ("--rotate" in arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (output / "tokenizer.json").is_file()


def test_formats_keep_the_codes_of_a_quantized_source(tmp_path):
    assert convert(tmp_path / "out", "--format=compressed-tensors", source="tiny-gptq-g128") == 0
    folders = (paths.fixture("tiny-gptq-g128"), tmp_path / "out")
    first, second = (
        llama.build(checkpoints.open_checkpoint(folder), jnp.float32) for folder in folders
    )
    for a, b in zip(selfcheck.quantized(first), selfcheck.quantized(second), strict=True):
        np.testing.assert_array_equal(a.codes, b.codes)
        np.testing.assert_array_equal(a.scales, b.scales)


def test_the_same_seed_gives_the_same_file(tmp_path, text):
    for name in ("a", "b"):
        arguments = ("--scheme=w4a8-qqq", "--rotate", "--seed=3", f"--calibration_file={text}")
        assert convert(tmp_path / name, *arguments, *CALIBRATED) == 0
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("a", "b"))
    assert first == second


def test_a_rotation_can_be_used_again(tmp_path):
    for name, argument in (
        ("a", "--rotate"),
        ("b", f"--rotation={tmp_path}/a/rotation.safetensors"),
    ):
        assert convert(tmp_path / name, "--format=dense", argument) == 0
    ids = {manifest.read(tmp_path / name)["rotation"] for name in ("a", "b")}
    assert len(ids) == 1
    gain = rotation.load(tmp_path / "b" / "rotation.safetensors").norm_gain
    plain = checkpoints.open_checkpoint(paths.fixture("tiny-fp16"))
    np.testing.assert_allclose(gain, plain.tensor("model.norm.weight", (256,)))


def test_a_head_for_the_rotated_target(tmp_path, capsys):
    assert convert(tmp_path / "target", "--format=dense", "--rotate") == 0
    arguments = (
        f"--head={paths.fixture('eagle2-tiny')}",
        f"--rotation={tmp_path}/target/rotation.safetensors",
    )
    assert convert(tmp_path / "head", *arguments) == 0
    ids = {manifest.read(tmp_path / name)["rotation"] for name in ("target", "head")}
    assert len(ids) == 1
    assert convert(tmp_path / "other", arguments[0]) == 2
    assert "is an EAGLE-1/2 head: converting it needs rotation" in capsys.readouterr().err


REFUSALS = [
    ("--format=zip", "format='zip' is unknown; supported: dense, gptq"),
    ("--scheme=w3a16", "scheme='w3a16' is unknown; known schemes"),
    ("--scheme=w4a16 --method=awq", "method='awq' is unknown; supported"),
    ("--scheme=w4a16 --group_size=96", "group_size=96 does not divide in_features=256"),
    ("--scheme=w4a16 --method=gptq", "method='gptq' needs calibration_file"),
    ("--scheme=w4a8-qqq --format=gptq", "w4a8-qqq does not fit format gptq"),
    ("--scheme=w4a4 --rotate --format=gptq", "w4a4"),
    ("--method=gptq", "method, group_size and head_scheme quantize: say to which scheme"),
    ("--dtype=int8", "dtype='int8' is unknown"),
    ("--scheme=w8a8 --method=smoothquant --calibration_file=/none.txt", "no such file"),
    ("--format=gptq", "the model has none"),
    ("--rotation=/none.safetensors", "no such file"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSALS)
def test_refusals(arguments, message, tmp_path, capsys):
    assert convert(tmp_path / "out", *arguments.split()) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert message in printed
    assert list(tmp_path.iterdir()) == []


def test_too_little_text_is_refused(tmp_path, text, capsys):
    arguments = ("--scheme=w4a16", f"--calibration_file={text}", "--calibration_samples=500")
    assert convert(tmp_path / "out", *arguments) == 2
    assert "500 are wanted (256000 tokens)" in capsys.readouterr().err


def test_an_existing_output_is_kept(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    assert convert(tmp_path / "out", "--format=dense") == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine.txt").read_text() == "x"
    assert convert(tmp_path / "out", "--format=dense", "--overwrite") == 0
    assert not (tmp_path / "out" / "mine.txt").exists()


def test_a_rotated_source_is_not_rotated_again(tmp_path):
    with pytest.raises(ConfigError, match="rotated already"):
        conversion.convert(
            paths.fixture("rotation-tiny"), tmp_path / "out", format="dense", rotate=True
        )


def test_a_wrong_copy_is_noticed_and_deleted(tmp_path, monkeypatch):
    """A writer that loses a bit of one code: the check finds it."""
    from specjax.checkpoints import gptq

    original = gptq.pack_linear

    def damaged(linear, prefix):
        tensors = original(linear, prefix)
        tensors[f"{prefix}.qweight"][3] ^= 5
        return tensors

    packer = conversion.export.PACKERS["gptq"]
    monkeypatch.setitem(
        conversion.export.PACKERS, "gptq", type(packer)(**{**vars(packer), "pack": damaged})
    )
    with pytest.raises(CheckpointError, match="read back, its logits differ"):
        conversion.convert(
            *(paths.fixture("tiny-fp16"), tmp_path / "out"),
            format="gptq",
            scheme="w4a16",
            group_size=64,
        )
    assert not (tmp_path / "out").exists()


def test_what_a_conversion_is_compared_on(tmp_path, caplog):
    config = checkpoints.open_checkpoint(paths.fixture("tiny-fp16")).config
    reader = tokenizer.load(paths.fixture("tiny-fp16"))
    windows = np.arange(200, dtype=np.int32).reshape(2, 100)
    kind, tokens = selfcheck.probe_tokens(windows, reader, config, 0)
    assert kind == "calibration text" and tokens.tolist() == [list(range(64))]
    kind, tokens = selfcheck.probe_tokens(None, reader, config, 0)
    assert kind == "English text" and tokens.shape == (1, 64)
    assert reader.decode(tokens[0].tolist()).startswith("Water boils")
    small = dataclasses.replace(config, vocab_size=int(tokens.max()))
    for given in ((None, reader, small), (None, None, config)):
        kind, tokens = selfcheck.probe_tokens(*given, 0)
        assert kind == "random tokens" and tokens.max() < given[2].vocab_size
    source = tmp_path / "source"
    shutil.copytree(paths.fixture("tiny-fp16"), source)
    (source / "tokenizer.json").write_text("{")
    result = conversion.convert(source, tmp_path / "out", format="dense")
    assert result.probe == "random tokens" and "compared on random tokens" in caplog.text
