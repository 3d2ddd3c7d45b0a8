"""Against other people's outputs: transformers with torch in float32, on tiny-fp16 and on SmolLM2-135M."""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import specjax
from specjax.drafters.lm import LM
from specjax.files import hub
from specjax.models import llama
from tests import paths, planned, tiny

TIE = 1e-3
NAME = "smollm2-135m"


def test_tiny_logits():
    golden = load_file(paths.golden("tiny-fp16.safetensors"))
    found = jax.jit(llama.full_logits)(tiny.fixture_model(), jax.numpy.asarray(golden["input_ids"]))
    error = np.abs(np.asarray(found) - golden["logits"]).max()
    print(f"largest error {error:.2e}")
    assert error <= 2e-4


def test_tiny_greedy_continuations():
    model = specjax.load(paths.fixture("tiny-fp16"), dtype="float32")
    rows = tiny.fixture_texts()
    prompts = [row["input_ids"] for row in rows]
    results = model.generate(prompts, max_new_tokens=64, batch_size=6)
    for row, result in zip(rows, results, strict=True):
        assert result.output_ids == row["greedy_ids"]
        assert result.input_ids == row["input_ids"]


HEAD = {"kind": "eagle", "draft_depth": 3, "topk": 4, "num_nodes": 8}


@functools.cache
def smollm2() -> specjax.LanguageModel:
    """The model that ships, if it has been fetched: tests do not fetch 98 MB by themselves."""
    file = hub.default_cache_dir() / "specjax" / NAME / hub.NAMED_MODELS[NAME].file_name
    if not file.is_file():
        pytest.skip(f"{NAME} is not in the cache; specjax.load({NAME!r}) fetches it")
    return specjax.load(NAME, dtype="float32")


@functools.cache
def rows() -> list[dict]:
    with open(paths.golden("smollm2_hf_fp32.jsonl")) as file:
        return [json.loads(line) for line in file]


def agrees(row: dict, found: list[int]) -> bool:
    """Whether the tokens are the golden's; a difference where its two best logits are close is a tie (False)."""
    expected = row["greedy_ids"][: len(found)]
    if found == expected:
        return True
    at = next(i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
    margin = row["top2_margin"][at]
    assert margin < TIE, f"question {row['question_id']}, token {at}: margin {margin}"
    return False


def check(selected: list[dict], drafter="none", new_tokens: int = 96, batch_size: int = 1):
    """Golden tokens from a drafter, one tie at most; returns the results."""
    prompts = [{"input_ids": row["input_ids"]} for row in selected]
    results = smollm2().generate(prompts, drafter, max_new_tokens=new_tokens, batch_size=batch_size)
    same = []
    for row, result in zip(selected, results, strict=True):
        assert len(result.output_ids) == min(new_tokens, len(row["greedy_ids"]))
        same.append(agrees(row, result.output_ids))
    histogram = np.sum([result.metrics.acceptance_histogram for result in results], axis=0)
    print(f"{len(same) - sum(same)} ties in {len(same)} rows; accepted {histogram.tolist()}")
    assert same.count(False) <= 1
    return histogram


def shortest(count: int) -> list[dict]:
    return sorted(rows(), key=lambda row: len(row["input_ids"]))[:count]


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["none", "ngram"])
def test_smollm2_two_rows(drafter):
    smollm2()
    with tiny.hurried_compiler():
        check(shortest(2), drafter, new_tokens=20)


@pytest.mark.slow
def test_the_head_that_ships():
    smollm2()
    with tiny.hurried_compiler():
        histogram = check(shortest(2), HEAD, new_tokens=24)
    assert 1 + np.arange(len(histogram)) @ histogram / histogram.sum() > 1.5


def test_smollm2_renders_and_decodes_as_transformers_does():
    model = smollm2()
    for row in rows():
        assert model.encode(row["prompt"]) == row["input_ids"]
        text = model.tokenizer.decode(row["greedy_ids"], skip_special_tokens=False)
        assert text == row["text"]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("drafter", ["none", "ngram", "self", pytest.param(HEAD, id="eagle")])
def test_smollm2_all_rows(drafter, batch_size):
    smollm2()
    check(rows(), drafter, batch_size=batch_size)


def planned_on_smollm2(plan, shape):
    texts = [row["input_ids"] + row["greedy_ids"] for row in shortest(6)]
    return planned.planned(texts, plan, shape, smollm2().config.vocab_size)


PLANS = {
    "oracle": ((4,), planned.CHAIN, {4}),
    "adversary": ((0,), planned.CHAIN, {0}),
    "planned": ((2, 0, 4, 1, 3), planned.CHAIN, {0, 1, 2, 3, 4}),
    "planned-tree": ((1, 3, 0, 2), planned.TREE, {0, 1, 2, 3}),
}


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("name", PLANS)
def test_smollm2_planned_acceptances(name, batch_size):
    plan, shape, expected = PLANS[name]
    smollm2()
    histogram = check(shortest(6), planned_on_smollm2(plan, shape), 32, batch_size)
    assert set(np.flatnonzero(histogram)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 4])
def test_smollm2_draft_model_that_often_agrees(batch_size):
    drafter = LM(model=tiny.noisy(smollm2().module, 0.1), draft_depth=3)
    histogram = check(shortest(6), drafter, 32, batch_size)
    assert histogram[0] and histogram[1:-1].any() and histogram[-1]
