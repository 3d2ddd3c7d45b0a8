"""What is stored and not read: parts that a configuration leaves out are found, buffers are not."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import specjax
from specjax import checkpoints
from specjax.checkpoints import heads, inventory
from specjax.config import ModelConfig
from specjax.errors import CheckpointError
from specjax.models import llama
from specjax.quantize import selfcheck
from tests import fuzz_bases, paths
from tests.checkpoints import folders, test_hf


def opened(path, weights, **fields):
    checkpoint = checkpoints.open_checkpoint(test_hf.folder(path, weights, **fields))
    llama.build(checkpoint, jnp.float32)
    return checkpoint


def test_every_tensor_of_a_plain_model_is_read(tmp_path):
    assert inventory.unread(opened(tmp_path, test_hf.tensors())) == ()


@pytest.mark.parametrize(
    "name, shape",
    [
        ("model.layers.0.self_attn.sinks", (2,)),
        ("model.embed_norm.weight", (16,)),
    ],
)
def test_a_part_that_the_model_does_not_have_is_named(tmp_path, name, shape, caplog):
    weights = test_hf.tensors() | {name: np.ones(shape, np.float16)}
    checkpoint = opened(tmp_path, weights)
    assert inventory.unread(checkpoint) == (name,)
    with pytest.raises(CheckpointError, match=f"1 stored tensors are not part .*{name}"):
        inventory.check(checkpoint)
    inventory.warn(checkpoint)
    assert name in caplog.text


def test_buffers_empty_tensors_and_other_models_are_no_part(tmp_path):
    others = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float16),
        "model.layers.0.self_attn.k_scale": np.ones(1, np.float16),
        "model.layers.0.mlp.up_proj.s_group": np.ones(0, np.float16),
        "model.layers.0.self_attn.q_proj.weight_zero_point": np.zeros(16, np.int8),
        "vision_tower.layers.3.weight": np.ones(1, np.float16),
        "mtp.fc.weight": np.ones(1, np.float16),
    }
    assert inventory.unread(opened(tmp_path, test_hf.tensors() | others)) == ()


@pytest.mark.parametrize("same", [True, False])
def test_an_output_head_that_a_flag_leaves_out(tmp_path, same, monkeypatch):
    """Whatever the configuration makes of the flag, a head that differs from the embedding must not be lost."""
    weights = test_hf.tensors()
    if same:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    checkpoint = checkpoints.open_checkpoint(test_hf.folder(tmp_path, weights))
    tied = ModelConfig(**{**vars(checkpoint.config), "tie_word_embeddings": True})
    monkeypatch.setattr(checkpoint, "config", tied)
    llama.build(checkpoint, jnp.float32)
    assert inventory.unread(checkpoint) == (() if same else ("lm_head.weight",))


def test_convert_refuses_a_source_whose_parts_it_would_drop(tmp_path):
    source, extra = tmp_path / "source", "model.embed_norm.weight"
    source.mkdir()
    test_hf.folder(source, test_hf.tensors() | {extra: np.ones(16, np.float16)})
    with pytest.raises(CheckpointError, match=extra):
        specjax.convert(source, tmp_path / "out", format="dense")
    assert not (tmp_path / "out").exists()


def test_layers_beyond_those_that_are_counted(tmp_path):
    weights = test_hf.tensors()
    weights |= {n.replace(".0.", ".1."): a for n, a in weights.items() if ".layers.0." in n}
    path = test_hf.folder(tmp_path, weights)
    message = r"model\.layers\.1\..* num_hidden_layers .*= 1"
    with pytest.raises(CheckpointError, match=message):
        checkpoints.open_checkpoint(path)


def test_layers_that_are_counted_and_not_there(tmp_path):
    path = test_hf.folder(tmp_path, test_hf.tensors(), num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"layer 1 is missing: .*num_hidden_layers .* = 3"):
        checkpoints.open_checkpoint(path)


def test_a_part_that_is_written_and_not_read_back_is_found(tmp_path):
    (tmp_path / "m").mkdir()
    path = test_hf.folder(tmp_path / "m", test_hf.tensors())
    checkpoint = checkpoints.open_checkpoint(path)
    module = llama.build(checkpoint, jnp.float32)
    selfcheck._check_parts(module, module, checkpoint)
    without = llama.Llama(module.config, module.model, None)
    with pytest.raises(CheckpointError, match=r"differs from the model in memory in lm_head\."):
        selfcheck._check_parts(module, without, checkpoint)
    assert not path.exists()


def medusa(path, remove=(), **fields):
    base = next(base for base in fuzz_bases._heads() if base.kind == "medusa")
    config = {k: v for k, v in (base.files["config.json"] | fields).items() if k not in remove}
    fuzz_bases.write(base, path)
    (path / "config.json").write_text(json.dumps(config))
    return heads.load_medusa(path, fuzz_bases.target())[0]


@pytest.mark.parametrize("fields", [{}, {"medusa_num_heads": 5}, {"medusa_num_layers": 3}])
def test_medusa_heads_are_counted_in_the_file(tmp_path, fields, caplog):
    assert len(medusa(tmp_path / "m", **fields).heads) == 2
    assert all(name in caplog.text for name in fields)


def test_medusa_without_counts(tmp_path, caplog):
    found = medusa(tmp_path / "m", remove=("medusa_num_heads", "medusa_num_layers"))
    assert len(found.heads) == 2 and not caplog.text


@pytest.mark.parametrize("same", [True, False])
def test_a_head_under_the_names_of_its_architecture(tmp_path, same):
    """GPT-2's embedding is `transformer.wte`: a head that repeats it is no part that was dropped."""
    source = paths.require("architectures/gpt2")
    weights = folders.read_all(source / "model.safetensors")
    head = weights["transformer.wte.weight"]
    weights["lm_head.weight"] = head if same else head[::-1].copy()
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    shutil.copy(source / "config.json", tmp_path)
    checkpoint = checkpoints.open_checkpoint(tmp_path)
    assert checkpoint.config.tie_word_embeddings is same
    llama.build(checkpoint, jnp.float32)
    assert inventory.unread(checkpoint) == ()
