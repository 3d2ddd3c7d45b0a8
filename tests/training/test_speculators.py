"""Heads written in the speculators layout are read back equal, and draft as before."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from specjax.checkpoints import heads
from specjax.drafters import head as opening
from specjax.errors import ConfigError
from specjax.training import export, initial
from tests import head_fixtures, tiny

NAMES = ("eagle31-llama", "eagle3-normfc-llama", "peagle-qwen3", "mtp-qwen3")


def opened(path, target, depth: int = 3):
    return opening.build(target, str(path), tree="chain", draft_depth=depth)


def target_of(name: str):
    return head_fixtures.target("tiny8-qwen3" if name.endswith("qwen3") else "tiny8-llama")


def same(found, expected) -> None:
    """All parameters and static settings, but for the file that the configuration came from."""
    first, second = (jax.tree.flatten(head) for head in (found, expected))
    assert len(first[0]) == len(second[0])
    for a, b in zip(first[0], second[0], strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read_back(name, tmp_path):
    target = target_of(name)
    before = opened(head_fixtures.folder(name), target).head
    export.write(
        *(before, tmp_path / "out"),
        dtype=jnp.float32,
        facts={},
        overwrite=False,
        layout="speculators",
        target=target.module,
        target_name="verifier",
        num_tokens=4,
    )
    drafter = opening.build(target, str(tmp_path / "out"), tree="chain")
    assert drafter.draft_depth == 4 if hasattr(drafter, "draft_depth") else drafter.max_depth == 4
    same(opened(tmp_path / "out", target).head, before)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    upstream = json.loads((head_fixtures.folder(name) / "config.json").read_text())
    # What upstream states and we do not are names of files, and defaults of its own classes.
    left_out = upstream.keys() - written.keys()
    assert left_out <= {"auto_map", "transformers_version", "dtype"}
    for field in ("architectures", "speculators_model_type", "norm_before_residual", "fc_norm"):
        assert written.get(field) == upstream.get(field)


@pytest.mark.slow
def test_a_head_that_was_made_here(tmp_path):
    """Embeddings are the target's and are stored all the same; the draft vocabulary is a part."""
    target = head_fixtures.target("tiny8-llama")
    made = initial.eagle3_head(target.module, jax.random.key(0), jnp.arange(3, 200, 2))
    options = {"dtype": jnp.float32, "facts": {}, "overwrite": False, "target": target.module}
    export.write(made, tmp_path / "out", layout="speculators", **options)
    read = heads.load_eagle(tmp_path / "out", target.module, "tiny8-llama")
    table = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")[
        "embed_tokens.weight"
    ]
    np.testing.assert_array_equal(table, np.asarray(target.module.model.embed_tokens.weight[...]))
    assert read.embed_tokens is None  # a copy of the target's is not kept
    same(read, made)


@pytest.mark.parametrize(
    ("layout", "match"), [("upstream", "layout='speculators'"), ("speculators", "EagleHead")]
)
def test_layouts_refuse_what_they_cannot_hold(layout, match, tmp_path):
    parts = tiny.Parts(tiny.model())
    head = parts.eagle31 if layout == "upstream" else parts.eagle
    with pytest.raises(ConfigError, match=match):
        export.write(
            head, tmp_path / "out", facts={}, overwrite=False, layout=layout, target=parts.target
        )
    assert not (tmp_path / "out").exists()


def test_windows_of_several_sizes_cannot_be_stated():
    from specjax.checkpoints import speculators

    config = dataclasses.replace(tiny.config(), windows=(4, 8))
    with pytest.raises(ConfigError, match="one sliding_window"):
        speculators.layer_config(config)
