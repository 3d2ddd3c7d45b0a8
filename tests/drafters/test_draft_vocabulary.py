"""Reduced draft vocabularies and int8 draft heads: rankings, their files, what the head then scores."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax.drafters import draft_vocabulary, registry
from specjax.errors import ConfigError
from specjax.quant.dense_linear import Linear
from specjax.quant.scheme import SCHEMES
from specjax.quantize import rtn, shrink
from tests import paths, tiny


@functools.cache
def model():
    return specjax.load(paths.fixture("tiny-fp16"), dtype="float32")


DOCUMENTS = [[5, 5, 5, 9, 9, 2], [5, 7, 7, 9]]


def test_ranking_counts():
    ranking = draft_vocabulary.from_documents(DOCUMENTS, model(), "here")
    assert ranking.token_ids == [5, 9, 7, 2]
    assert ranking.num_tokens == 10
    assert ranking.coverage == [0.4, 0.7, 0.9, 1.0]


def test_tokens_that_do_not_occur_follow_by_merges():
    ranking = draft_vocabulary.from_documents(DOCUMENTS, model(), "here", 9)
    merged = draft_vocabulary.from_merges(model()).token_ids
    others = [token for token in merged if token not in (5, 9, 7, 2)]
    assert ranking.token_ids == [5, 9, 7, 2, *others[:5]]
    assert ranking.coverage[3:] == [1.0] * 6
    assert draft_vocabulary.from_documents(DOCUMENTS, model(), "here", 2).token_ids == [5, 9]


def test_first_is_ascending_and_keeps_what_must_be_there():
    ranking = draft_vocabulary.from_documents(DOCUMENTS, model(), "here")
    assert ranking.first(2).tolist() == [5, 9]
    assert ranking.first(2, always=[1]).tolist() == [1, 5]
    assert ranking.first(3, always=[9]).tolist() == [5, 7, 9]
    assert ranking.first(None).tolist() == [2, 5, 7, 9]
    with pytest.raises(ConfigError, match="vocabulary_size=5: here lists 4"):
        ranking.first(5)


def test_merges_rank_by_age():
    ranking = draft_vocabulary.from_merges(model())
    vocab, merges = model().tokenizer.merges()
    assert sorted(ranking.token_ids) == sorted(set(vocab.values()))
    merged = [vocab[token] for token in merges]
    assert ranking.token_ids[-len(merged) :] == merged
    texts = [row["greedy_ids"] for row in tiny.fixture_texts()]
    early = set(ranking.token_ids[: len(ranking.token_ids) // 2])
    share = np.mean([token in early for text in texts for token in text])
    assert share > 0.6, "early merges should be the frequent tokens"


def test_files_round_trip_and_are_checked(tmp_path):
    path = tmp_path / "list.json"
    ranking = draft_vocabulary.from_documents(DOCUMENTS, model(), "here")
    draft_vocabulary.write(ranking, path)
    assert draft_vocabulary.read(path, model()) == ranking
    row = json.loads(path.read_text())
    for change, match in [
        ({"token_ids": [1, 1]}, "distinct ids"),
        ({"token_ids": [4096]}, "below the model's vocab_size"),
        ({"tokenizer": "other"}, "another tokenizer"),
    ]:
        path.write_text(json.dumps({**row, **change}))
        with pytest.raises(ConfigError, match=match):
            draft_vocabulary.read(path, model())
    path.write_text('{"token_ids": [1]}')
    with pytest.raises(ConfigError, match="not a list of token frequencies"):
        draft_vocabulary.read(path, model())
    with pytest.raises(FileNotFoundError, match=r"experiments\.token_frequencies"):
        draft_vocabulary.read(tmp_path / "absent.json", model())


def test_reduced_heads_score_the_rows_of_the_targets_output_head():
    target, head = tiny.fixture_model(), tiny.fixture_head()
    ids = jnp.asarray([3, 17, 500, 1023], jnp.int32)
    small = shrink.with_vocabulary(head, target, ids)
    hidden = jax.random.normal(jax.random.key(0), (2, 3, target.config.hidden_size))
    found = small.logits(hidden, target)
    np.testing.assert_allclose(found, head.logits(hidden, target)[..., ids], atol=1e-4)
    assert small.target_ids(jnp.asarray([2, 0], jnp.int32)).tolist() == [500, 3]
    assert small.fc is head.fc, "what stays is shared"


def test_rotated_heads_reduce_their_own_output_head():
    target = tiny.fixture_model("rotation-tiny")
    head = tiny.fixture_head("rotation-eagle2-tiny", "rotation-tiny")
    ids = jnp.asarray([8, 9], jnp.int32)
    hidden = jax.random.normal(jax.random.key(0), (2, target.config.hidden_size))
    small = shrink.with_vocabulary(head, target, ids)
    expected = head.logits(hidden, target)[..., ids]
    np.testing.assert_allclose(small.logits(hidden, target), expected, atol=1e-4)
    rounded = shrink.quantized(small, target, "w8a16")
    assert rounded.rotation is head.rotation
    assert rounded.draft_ids is not None


def test_int8_heads_hold_rounded_weights():
    target, head = tiny.fixture_model(), tiny.fixture_head()
    small = shrink.quantized(head, target, "w8a16")
    expected = rtn.quantize(head.fc.weight[...], SCHEMES["w8a16"]).dequantize()
    assert isinstance(small.fc, Linear), "weight-only codes are dense on CPUs"
    np.testing.assert_array_equal(small.fc.weight[...], expected)
    assert small.lm_head.out_features == target.config.vocab_size
    with pytest.raises(ConfigError, match="supported are w8a16"):
        shrink.quantized(head, target, "w4a4")


def test_eagle3_heads_keep_their_own_vocabulary():
    target = tiny.fixture_model("tiny8-fp16")
    head = tiny.fixture_head("eagle3-tiny", "tiny8-fp16")
    with pytest.raises(ConfigError, match="draft vocabulary of its own"):
        shrink.with_vocabulary(head, target, jnp.asarray([1], jnp.int32))
    rounded = shrink.quantized(head, target, "w8a16")
    weight = head.midlayer.mlp.up_proj.weight[...]
    expected = rtn.quantize(weight, SCHEMES["w8a16"]).dequantize()
    np.testing.assert_array_equal(rounded.midlayer.mlp.up_proj.weight[...], expected)


def spec(**options) -> dict:
    return {"kind": "eagle", "model": str(paths.fixture("eagle2-tiny")), **options}


def test_drafts_come_from_the_list_and_the_output_stays(tmp_path):
    path = tmp_path / "list.json"
    texts = [row["greedy_ids"] for row in tiny.fixture_texts()[:4]]
    draft_vocabulary.write(draft_vocabulary.from_documents(texts, model(), "texts"), path)
    options = {"draft_depth": 3, "topk": 4, "num_nodes": 10, "vocabulary": str(path)}
    prompts = tiny.prompts()[:2]
    with tiny.hurried_compiler():
        plain = model().generate(prompts, max_new_tokens=20, batch_size=2)
        drafter = model().drafter(spec(**options, scheme="w8a16"))
        allowed = set(drafter.head.draft_ids[...].tolist())
        found = model().generate(prompts, drafter, max_new_tokens=20, batch_size=2)
    assert [r.output_ids for r in found] == [r.output_ids for r in plain]
    assert allowed >= set(model().config.eos_token_ids)
    assert sum(r.metrics.num_accepted_draft_tokens for r in found) > 0


def test_sizes_and_lists_that_do_not_fit_are_refused(tmp_path):
    size = len(draft_vocabulary.from_merges(model()).token_ids)
    drafter = registry.build(spec(vocabulary_size=64), model())
    assert drafter.head.draft_ids.shape == (64,)
    with pytest.raises(ConfigError, match=f"lists {size} tokens"):
        registry.build(spec(vocabulary_size=size + 1), model())
    with pytest.raises(ConfigError, match="topk=10 exceeds the draft vocabulary of 8"):
        registry.build(spec(vocabulary_size=8), model())
    with pytest.raises(FileNotFoundError, match="no such file"):
        registry.build(spec(vocabulary=str(tmp_path / "none.json")), model())
