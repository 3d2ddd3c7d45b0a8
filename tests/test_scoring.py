import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax import scoring
from specjax.errors import CapacityError, SpecjaxError
from specjax.models import llama
from tests import paths


@pytest.fixture(scope="module")
def model():
    return specjax.load(paths.fixture("tiny-fp16"), dtype="float32")


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(4, 1024, (2, 41))


@pytest.mark.parametrize("chunk", [16, 256])
def test_logits_in_pieces_equal_one_pass(model, ids, monkeypatch, chunk):
    monkeypatch.setattr(scoring, "_CHUNK", chunk)
    expected = jax.jit(llama.full_logits)(model.module, jnp.asarray(ids, jnp.int32))
    found = scoring.logits(model, ids)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def _nll(model, inputs, targets) -> np.ndarray:
    """Losses of one window in float64, from its logits."""
    padded = np.zeros((1, 16), np.int32)
    padded[0, : len(inputs)] = inputs
    values = scoring.logits(model, padded)[0, : len(inputs)].astype(np.float64)
    norm = np.log(np.exp(values - values.max(-1, keepdims=True)).sum(-1)) + values.max(-1)
    return norm - values[np.arange(len(targets)), targets]


def test_perplexity_with_bos_scores_every_token(model, ids):
    text, bos = ids.ravel(), model.config.bos_token_id
    losses = []
    for begin in range(0, text.size, 16):
        part = text[begin : begin + 16]
        losses.append(_nll(model, [bos, *part[:-1]], part))
    found = scoring.perplexity(model, text, window=16)
    assert (found.num_tokens, found.num_windows) == (82, 6)
    assert found.nll == pytest.approx(np.concatenate(losses).mean(), abs=1e-5)
    assert found.perplexity == pytest.approx(np.exp(found.nll))
    assert scoring.perplexity(model, [bos, *text], window=16) == found


def test_perplexity_without_bos_uses_first_tokens_as_context(model, ids):
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, bos_token_id=None))
    text = ids.ravel()
    losses = []
    for begin in range(0, text.size, 16):
        part = text[begin : begin + 16]
        losses.append(_nll(model, part[:-1], part[1:]))
    found = scoring.perplexity(model, text, window=16)
    assert (found.num_tokens, found.num_windows) == (76, 6)
    assert found.nll == pytest.approx(np.concatenate(losses).mean(), abs=1e-5)


def test_a_text_shorter_than_a_window(model, ids):
    found = scoring.perplexity(model, ids[0], window=512)
    assert (found.num_tokens, found.num_windows, found.window) == (41, 1, 512)


def test_bad_input_is_refused(model):
    with pytest.raises(CapacityError, match="0 tokens"):
        scoring.perplexity(model, [])
    with pytest.raises(CapacityError, match="max_position_embeddings=2048"):
        scoring.perplexity(model, [5] * 3000, window=3000)
    with pytest.raises(CapacityError, match="1024, outside"):
        scoring.perplexity(model, [5] * 100 + [1024], window=16)
    with pytest.raises(CapacityError, match="outside"):
        scoring.logits(model, np.full((1, 3), -2))


def test_values_that_are_not_finite_are_refused(model, ids):
    broken = specjax.load(paths.fixture("tiny-fp16"), dtype="float32")
    gain = broken.module.model.norm.weight
    gain[...] = gain[...] * jnp.nan
    with pytest.raises(SpecjaxError, match="not finite"):
        scoring.perplexity(broken, ids[0])
