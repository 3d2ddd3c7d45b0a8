"""EAGLE heads for rotated targets: the reference converter's file, and refusals of wrong pairs."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from specjax import checkpoints
from specjax.checkpoints import heads as draft_heads
from specjax.checkpoints.head_folder import HeadFolder
from specjax.errors import CheckpointError, ConfigError
from specjax.files import pickle, source, torch_writer
from specjax.models import cache as kv
from specjax.models import layers as nn
from specjax.models import llama
from specjax.quant import rotation
from specjax.quantize import heads, rotate
from tests import head_fixtures, paths


def target(name="tiny-fp16"):
    return checkpoints.open_checkpoint(paths.fixture(name))


@pytest.fixture(scope="module")
def rotated_head(tmp_path_factory):
    """eagle2-tiny for the Q of rotation-tiny."""
    made = rotation.load(paths.fixture("rotation-tiny") / "rotation.pth")
    output = tmp_path_factory.mktemp("heads") / "rotated"
    return heads.rotate_head(paths.fixture("eagle2-tiny"), target(), made, output)


def test_equals_the_reference_conversion(rotated_head):
    expected = pickle.TorchFile(paths.fixture("rotation-eagle2-tiny") / "pytorch_model.bin")
    found = pickle.TorchFile(rotated_head / "pytorch_model.bin")
    assert set(found.names()) == set(expected.names())
    for name in expected.names():
        assert found.dtype(name) == expected.dtype(name)
        np.testing.assert_array_equal(found.read(name), expected.read(name))


def features(model, needs):
    """What a head sees of a model on fixed tokens: final features, or inputs of layers."""
    tokens = jnp.asarray(
        np.random.default_rng(0).integers(4, min(1000, model.config.vocab_size), (1, 16))
    )
    cache = kv.init(model.config, 1, 16, jnp.float32)
    capture = () if needs == "final" else needs
    out = model(nn.causal_block(tokens, jnp.zeros((1,), jnp.int32)), cache, capture=capture)
    return out.hidden if needs == "final" else jnp.concatenate(out.captured, axis=-1)


def test_fused_features_are_the_plain_ones(rotated_head):
    plain = llama.build(target(), jnp.float32)
    turned = rotate.rotate(plain, rotation.load(rotated_head / rotation.FILE_NAME))
    first = draft_heads.load_eagle(paths.fixture("eagle2-tiny"), plain, "plain")
    second = draft_heads.load_eagle(rotated_head, turned, "rotated")
    expected, found = first.fuse(features(plain, "final")), second.fuse(features(turned, "final"))
    np.testing.assert_allclose(found, expected, atol=2e-4 * float(jnp.abs(expected).max()))


def test_eagle3_heads_fold_the_rotation_and_take_the_speculators_layout(tmp_path):
    checkpoint = target("tiny8-fp16")
    made = rotation.random_hadamard(checkpoint.config, 3)
    output = heads.rotate_head(paths.fixture("eagle3-tiny"), checkpoint, made, tmp_path / "out")
    plain = llama.build(checkpoint, jnp.float32)
    turned = rotate.rotate(plain, made)
    first = draft_heads.load_eagle(paths.fixture("eagle3-tiny"), plain, "plain")
    second = draft_heads.load_eagle(output, turned, "rotated")
    assert first.needs == second.needs
    expected, found = (h.fuse(features(m, h.needs)) for h, m in ((first, plain), (second, turned)))
    np.testing.assert_allclose(found, expected, atol=1e-3 * float(jnp.abs(expected).max()))
    config = json.loads((output / "config.json").read_text())
    assert config["speculators_model_type"] == "eagle3"
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert config["transformer_layer_config"]["hidden_size"] == 128
    assert "layers.0.hidden_norm.weight" in source.open_source(output).names()


def test_eagle3_heads_change_layout_without_a_rotation(tmp_path):
    head, checkpoint = paths.fixture("eagle3-tiny"), target("tiny8-fp16")
    output = heads.rotate_head(head, checkpoint, None, tmp_path / "out")
    found, expected = source.open_source(output), source.open_source(head)
    assert len(found.names()) == len(expected.names())
    for name in expected.names():
        stored = found.read(name.replace("midlayer.", "layers.0."))
        np.testing.assert_array_equal(stored, expected.read(name))
    heads.check_pair(paths.fixture("tiny8-fp16"), output)


@pytest.mark.parametrize("name", ["eagle31-llama", "eagle3-normfc-llama", "peagle-qwen3"])
def test_norms_in_front_of_fc_and_mask_rows_are_folded(name, tmp_path):
    facts = head_fixtures.Golden(name).facts
    checkpoint = checkpoints.open_checkpoint(head_fixtures.folder(facts["target"]))
    made = rotation.random_hadamard(checkpoint.config, 3)
    plain = llama.build(checkpoint, jnp.float32)
    folder = head_fixtures.folder(name)
    output = heads.rotate_head(folder, checkpoint, made, tmp_path / "out")
    turned = rotate.rotate(plain, made)
    read = [HeadFolder(path) for path in (folder, output)]
    pairs = [draft_heads.open_eagle3(f, m) for f, m in zip(read, (plain, turned), strict=True)]
    assert pairs[0].needs == pairs[1].needs and pairs[0].variant == pairs[1].variant
    expected, found = (
        h.fuse(features(m, h.needs)) for h, m in zip(pairs, (plain, turned), strict=True)
    )
    np.testing.assert_allclose(found, expected, atol=3e-3 * float(jnp.abs(expected).max()))
    if "mask_hidden" in read[0].names:
        masks = [
            h.fuse(jnp.asarray(f.tensors.read("mask_hidden")[0, 0], jnp.float32))
            for h, f in zip(pairs, read, strict=True)
        ]
        np.testing.assert_allclose(masks[1], masks[0], atol=3e-3)


def test_pairs(rotated_head):
    """Targets and heads that fit, and those that do not."""
    plain, rotated = paths.fixture("tiny-fp16"), paths.fixture("rotation-tiny")
    head, reference = paths.fixture("eagle2-tiny"), paths.fixture("rotation-eagle2-tiny")
    for pair in ((plain, head), (rotated, rotated_head), (rotated, reference)):
        heads.check_pair(*pair)
    with pytest.raises(CheckpointError, match=r"is not rotated, but the target .* is"):
        heads.check_pair(rotated, head)
    for rotated_one in (rotated_head, reference):
        with pytest.raises(CheckpointError, match="is for a rotated target"):
            heads.check_pair(plain, rotated_one)


def test_another_rotation_is_refused(tmp_path, rotated_head):
    other = rotation.random_hadamard(target().config, 9)
    rotation.save(other, tmp_path)
    with pytest.raises(CheckpointError, match="is for another rotation"):
        heads.check_pair(tmp_path, rotated_head)
    with pytest.raises(CheckpointError, match="is for another rotation"):
        heads.check_pair(tmp_path, paths.fixture("rotation-eagle2-tiny"))


def test_refusals(tmp_path, rotated_head):
    made = rotation.load(rotated_head / rotation.FILE_NAME)
    with pytest.raises(CheckpointError, match="is rotated already"):
        heads.rotate_head(rotated_head, target(), made, tmp_path / "out")
    small = rotation.Rotation(residual=np.eye(8))
    with pytest.raises(
        ConfigError, match="rotation is of order 8, the target's hidden_size is 256"
    ):
        heads.rotate_head(paths.fixture("eagle2-tiny"), target(), small, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is no EAGLE head"):
        heads.rotate_head(paths.fixture("tiny-fp16"), target(), made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_torch_files_round_trip(tmp_path):
    arrays = {
        "a.weight": np.arange(12, dtype=np.float16).reshape(3, 4).T,
        "b": np.arange(5, dtype=np.int64),
        "c": np.array(3, np.float32),
        "d": np.ones((2, 3, 4), jnp.bfloat16),
    }
    torch_writer.save(arrays, tmp_path / "x.bin")
    found = pickle.TorchFile(tmp_path / "x.bin")
    assert list(found.names()) == list(arrays)
    for name, array in arrays.items():
        assert found.dtype(name) == array.dtype
        np.testing.assert_array_equal(found.read(name), array)
    with pytest.raises(CheckpointError, match="bad: dtype uint32 cannot be stored"):
        torch_writer.save({"bad": np.zeros(2, np.uint32)}, tmp_path / "y.bin")
