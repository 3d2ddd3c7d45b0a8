"""Draft models with another number of embedding rows than the target: the common tokens are drafted, and no others."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax.drafters import common_vocabulary, registry
from specjax.drafters.hierarchical import Hierarchical
from specjax.drafters.lm import LM
from specjax.drafters.ngram import Ngram
from specjax.engine.engine import Programs
from specjax.errors import ConfigError
from specjax.models import llama
from specjax.text import tokenizer
from tests import markov, paths, tiny

VOCAB = 16
PROMPTS = [[3, 5, 1], [9, 2, 15, 15, 7]]
PROGRAMS = Programs()


@functools.cache
def target():
    return tiny.model(tiny.config(vocab_size=VOCAB, num_layers=1), seed=1)


def draft(rows: int):
    """The target's parameters with fewer or more rows of vocabulary, so that most drafts are right."""
    other = tiny.model(tiny.config(vocab_size=rows, num_layers=1), seed=2)
    for ours, theirs in (
        (other.model.embed_tokens, target().model.embed_tokens),
        (other.lm_head, target().lm_head),
    ):
        common = min(rows, VOCAB)
        ours.weight[...] = ours.weight[...].at[:common].set(theirs.weight[...][:common])
    other.model.layers, other.model.norm = target().model.layers, target().model.norm
    return other


@pytest.mark.parametrize("rows", [12, 20])
def test_tokens_that_are_not_common_have_no_probability(rows):
    other = draft(rows)
    common_vocabulary.clip(other)
    fitted = common_vocabulary.CommonVocabulary(other, VOCAB)
    tokens = jnp.asarray([[1, 15, 11]])
    logits = llama.full_logits(fitted, tokens)
    known = min(rows, VOCAB)
    assert logits.shape == (1, 3, VOCAB)
    assert np.isfinite(logits[..., :known]).all() and (logits[..., known:] == -np.inf).all()
    plain = llama.full_logits(other, jnp.minimum(tokens, rows - 1))
    np.testing.assert_array_equal(logits[..., :known], plain[..., :known])
    again = common_vocabulary.CommonVocabulary(fitted, 30)
    assert (again.rows, again.config.vocab_size) == (known, 30)


CASES = [(kind, rows) for kind in ("lm", "hierarchical", "hierarchical-lm") for rows in (12, 20)]
FAST = [("lm", 12), ("hierarchical-lm", 20)]


@pytest.mark.parametrize(
    ("kind", "rows"),
    [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in CASES],
)
def test_greedy_output_is_the_targets(kind, rows):
    other = draft(rows)
    common_vocabulary.clip(other)
    drafter = LM(model=other, draft_depth=3)
    if kind == "hierarchical":
        drafter = Hierarchical(model=other, inner=Ngram(draft_depth=2), min_draft_depth=2)
    if kind == "hierarchical-lm":
        drafter = Hierarchical(model=draft(VOCAB), inner=drafter, min_draft_depth=2)
    drafter = drafter.fitted(VOCAB)
    with tiny.hurried_compiler():
        done = tiny.run(tiny.engine(target(), drafter, PROGRAMS), tiny.requests(PROMPTS, 12), 2)
    texts = tiny.greedy(target(), PROMPTS, 12)
    expected = [text[len(prompt) :] for text, prompt in zip(texts, PROMPTS, strict=True)]
    assert tiny.outputs(done) == expected
    assert tiny.histogram(done)[1:].any(), "some drafts are right"


def loaded(rows: int, reader=None, name: str = "x"):
    return SimpleNamespace(name=name, config=SimpleNamespace(vocab_size=rows), tokenizer=reader)


def test_other_tokenizers_are_refused_and_padding_is_not():
    tiny_tokens = tokenizer.load(paths.fixture("tiny-fp16"))
    others = tokenizer.load(paths.COPIED / "tokenizers" / "spm-tiny")
    check = common_vocabulary.check
    check(loaded(1024, tiny_tokens), loaded(5000, tiny_tokens))
    check(loaded(152_064), loaded(151_936))
    check(loaded(151_936), loaded(152_064, tiny_tokens))
    unreadable = tokenizer.Unreadable(ConfigError("broken"))
    check(loaded(64, unreadable), loaded(72, tiny_tokens))
    with pytest.raises(ConfigError, match="more than 128 rows of padding apart"):
        check(loaded(64), loaded(193))
    with pytest.raises(ConfigError, match=r"another tokenizer.*token 0 is '<unk>' there and '<s>'"):
        check(loaded(1024, tiny_tokens), loaded(1024, others))


@pytest.mark.parametrize(
    ("rows", "draft_rows"), [(72, 64), pytest.param(64, 72, marks=pytest.mark.slow)]
)
def test_directories_of_one_family_draft_for_each_other(tmp_path, rows, draft_rows):
    follows = {i: (i * 7 + 3) % 60 for i in range(60)}
    path = markov.write(tmp_path / "target", rows, follows)
    spec = {"kind": "lm", "model": str(markov.write(tmp_path / "draft", draft_rows, follows))}
    with tiny.hurried_compiler():
        model = specjax.load(path)
        [result] = model.generate([[1, 5, 9]], spec, max_new_tokens=8)
        assert registry.build(spec, model).model.config.vocab_size == rows
    assert result.output_ids == [6, 45, 18, 9, 6, 45, 18, 9]
    assert result.metrics.mean_acceptance_length == 5


def test_arrays_are_shared():
    other = draft(20)
    fitted = common_vocabulary.CommonVocabulary(other, VOCAB)
    assert len(jax.tree.leaves(fitted)) == len(jax.tree.leaves(other))
    assert all(a is b for a, b in zip(jax.tree.leaves(fitted), jax.tree.leaves(other), strict=True))
