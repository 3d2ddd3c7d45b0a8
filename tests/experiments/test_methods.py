import json

import pytest

from experiments.shared import methods
from specjax.drafters import registry
from specjax.errors import CheckpointError
from tests import paths


def test_a_dense_model_has_what_needs_nothing():
    specs = methods.available(str(paths.fixture("tiny-fp16")), dequantize="never")
    assert specs == [{"kind": "none"}, {"kind": "ngram"}]


def test_codes_allow_self_speculation_where_they_are_kept():
    model = str(paths.fixture("tiny-gptq-g128"))
    schemes = [spec.get("scheme") for spec in methods.available(model, dequantize="never")]
    assert schemes == [None, None, "w4a8", "w4a4"]
    assert len(methods.available(model, dequantize="load")) == 2


def test_checkpoints_add_their_drafters(tmp_path):
    heads = [str(paths.fixture(name)) for name in ("eagle2-tiny", "eagle3-tiny", "tiny-gptq-g128")]
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 2}))
    specs = methods.available(str(paths.fixture("tiny-fp16")), [*heads, str(tmp_path)])
    kinds = [spec["kind"] for spec in specs]
    assert kinds == ["none", "ngram", "eagle", "eagle", "lm", "hierarchical", "medusa"]
    for spec in specs:
        registry.check(spec)


def test_other_folders_are_refused(tmp_path):
    path = paths.fixture("eagle2-tiny")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError, match="neither a draft head"):
        methods.kind_of(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        methods.kind_of(str(path / "gone"))
