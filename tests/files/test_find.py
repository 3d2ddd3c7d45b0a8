"""Which files hold the weights: standard names, names in settings, the only candidate, and what is ambiguous."""

import json

import pytest

from specjax.errors import CheckpointError
from specjax.files import find

SIDE = ["config.json", "tokenizer.json", "training_args.bin", "adapter_model.safetensors"]
SHARDS = [f"m-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.mark.parametrize(
    "files, expected",
    [
        (["model.safetensors", "pytorch_model.bin", "other.safetensors"], "model.safetensors"),
        (["pytorch_model.bin", "quant_model.pt"], "pytorch_model.bin"),
        (["gptq_model-4bit-32g.safetensors"], "gptq_model-4bit-32g.safetensors"),
        (["vicuna.act-order.safetensors", "old.bin"], "vicuna.act-order.safetensors"),
        (["model.fp16.safetensors"], "model.fp16.safetensors"),
        (["weights.pth"], "weights.pth"),
        (["g.safetensors.index.json", *SHARDS], "g.safetensors.index.json"),
        (["consolidated.safetensors"], "consolidated.safetensors"),
        (["consolidated.safetensors", "x.safetensors"], "x.safetensors"),
    ],
)
def test_one_candidate(files, expected):
    assert find.weight_files([*SIDE, *files], "DIR") == (expected,)


def test_shards_without_an_index():
    assert find.weight_files([*SIDE, *reversed(SHARDS)], "DIR") == tuple(SHARDS)
    with pytest.raises(CheckpointError, match=rf"without an index, .*missing are {SHARDS[1]}"):
        find.weight_files([SHARDS[0], SHARDS[2]], "DIR")
    with pytest.raises(CheckpointError, match="several files of weights"):
        find.weight_files([*SHARDS, "m-00001-of-00002.safetensors"], "DIR")


@pytest.mark.parametrize(
    "files",
    [
        ["a.safetensors", "b.safetensors"],
        ["a.safetensors", *SHARDS],
        ["a.safetensors.index.json", "b.safetensors.index.json"],
        ["a.bin", "b.pt"],
    ],
)
def test_several_candidates_are_refused_with_the_list(files):
    with pytest.raises(CheckpointError, match=r"several files of weights.*keep one") as raised:
        find.weight_files([*SIDE, *files], "DIR")
    assert all(name in str(raised.value) for name in files if name not in SHARDS[1:])


def test_nothing_to_find():
    with pytest.raises(
        FileNotFoundError, match=r"no weights in DIR: looked for model\.safetensors"
    ):
        find.weight_files(SIDE, "DIR")


@pytest.mark.parametrize(
    "files, stated, expected",
    [
        (["a.safetensors", "b.safetensors"], "b", ("b.safetensors",)),
        (["a.safetensors", "b.bin"], "b", ("b.bin",)),
        (
            ["a.safetensors", "m.safetensors.index.json", *SHARDS],
            "m",
            ("m.safetensors.index.json",),
        ),
        (["a.safetensors", *SHARDS], "m", tuple(SHARDS)),
        (["model.safetensors"], "model", ("model.safetensors",)),
        (["model.safetensors", "a.safetensors"], "gone", ("model.safetensors",)),
        (["b.safetensors"], "gone", ("b.safetensors",)),
    ],
)
def test_the_name_in_the_settings_decides_between_several(files, stated, expected):
    assert find.weight_files([*SIDE, *files], "DIR", stated=stated) == expected


def test_a_stated_file_beside_the_standard_one_is_ambiguous():
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors, and b\.safetensors, which model_"
    ):
        find.weight_files(["model.safetensors", "b.safetensors"], "DIR", stated="b")


@pytest.mark.parametrize("file", ["quantize_config.json", "config.json"])
def test_where_the_name_is_stated(tmp_path, file):
    assert find.stated_name(tmp_path) is None
    settings = {"model_file_base_name": "gptq-4bit"}
    nested = settings if file == "quantize_config.json" else {"quantization_config": settings}
    (tmp_path / file).write_text(json.dumps(nested))
    assert find.stated_name(tmp_path) == "gptq-4bit"
    settings["model_file_base_name"] = "../other"
    (tmp_path / file).write_text(json.dumps(nested))
    with pytest.raises(CheckpointError, match=r"model_file_base_name='\.\./other'"):
        find.stated_name(tmp_path)
