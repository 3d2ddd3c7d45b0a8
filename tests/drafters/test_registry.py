"""A drafter as a new contributor adds it: the file that WORKSPACE.md shows, and one line of the registry."""

import re

import pytest

import specjax
from specjax import drafters
from specjax.drafters import registry
from specjax.errors import ConfigError
from tests import paths


@pytest.fixture
def repeat(tmp_path, monkeypatch):
    """The drafter of WORKSPACE.md, in a file beside the others and registered as its diff says."""
    text = (paths.REPOSITORY / "WORKSPACE.md").read_text(encoding="utf-8")
    [diff] = re.findall(r"^\+\+\+ b/specjax/drafters/repeat.py\n@@.*\n((?:\+.*\n)+)", text, re.M)
    code = "".join(line[1:] for line in diff.splitlines(keepends=True))
    (tmp_path / "repeat.py").write_text(code)
    monkeypatch.setattr(drafters, "__path__", [*drafters.__path__, str(tmp_path)])
    [(kind, module)] = re.findall(r'^\+    "(\w+)": "(\w+)",$', text, re.M)
    monkeypatch.setitem(registry._MODULES, kind, module)
    return kind


def test_a_drafter_is_one_file_and_one_line(repeat, hurried):
    assert registry.options(repeat) == {"draft_depth": 4, "period": 1}
    model = specjax.load(paths.fixture("tiny-fp16"), dtype="float32")
    prompts = [[5, 9, 5, 9, 5], [7]]
    plain = model.generate(prompts, max_new_tokens=12, batch_size=2)
    spec = {"kind": repeat, "period": 2}
    drafted = model.generate(prompts, drafter=spec, max_new_tokens=12, batch_size=2)
    assert [r.output_ids for r in drafted] == [r.output_ids for r in plain]
    with pytest.raises(ConfigError, match="period=0"):
        registry.build(spec | {"period": 0}, model)


@pytest.mark.parametrize("kind", ["eagle", "lm"])
def test_drafts_run_on_the_backend_of_their_target(kind):
    model = specjax.load(paths.fixture("tiny-fp16"), dtype="float32", backend="xla")
    path = paths.fixture("eagle2-tiny" if kind == "eagle" else "tiny-fp16")
    drafter = registry.build({"kind": kind, "model": str(path)}, model)
    module = drafter.head if kind == "eagle" else drafter.model.model
    assert {layer.self_attn.backend for layer in module.layers} == {"xla"}
