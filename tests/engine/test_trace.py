"""Records of steps: they add up to the output, name what was accepted and what was not, and cost nothing when off."""

import functools

import jax
import pytest

import specjax
from specjax.drafters.eagle import eagle
from specjax.drafters.ngram import Ngram
from specjax.drafters.none import NoDraft
from specjax.engine import decode as decoding
from tests import paths, planned, tiny

NEW_TOKENS = 24


@functools.cache
def model():
    return specjax.load(paths.fixture("tiny-fp16"), dtype="float32")


DRAFTERS = {
    "none": NoDraft,
    "ngram": lambda: Ngram(draft_depth=3, ngram_min=1),
    "eagle": lambda: eagle(tiny.fixture_head(), 2, 3, 7),
    "planned": lambda: planned.planned(tiny.greedy_texts(), (2, 0, 4, 1, 3)),
}


@functools.cache
def results(name: str):
    with tiny.hurried_compiler():
        return model().generate(
            tiny.prompts()[:2],
            DRAFTERS[name](),
            max_new_tokens=NEW_TOKENS,
            batch_size=2,
            trace=True,
        )


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "eagle" else n for n in DRAFTERS]
)
def test_steps_add_up_to_the_output(name):
    for result in results(name):
        metrics = result.metrics
        assert len(metrics.trace) == metrics.num_spec_steps
        text = [token for step in metrics.trace for token in (*step.accepted, step.token)]
        assert text[: NEW_TOKENS - 1] == result.output_ids[1:]
        counts = [len(step.accepted) for step in metrics.trace]
        found = [counts.count(size) for size in range(len(metrics.acceptance_histogram))]
        assert found == list(metrics.acceptance_histogram)
        assert sum(len(step.drafted) for step in metrics.trace) == metrics.num_draft_tokens


@pytest.mark.parametrize("name", DRAFTERS)
def test_steps_say_what_became_of_the_drafts(name):
    kinds = set()
    for step in (step for result in results(name) for step in result.metrics.trace):
        kinds.add(step.kind)
        at = -1
        for token in step.accepted:
            below = [i for i, parent in enumerate(step.parents) if parent == at]
            at = next(i for i in below if step.drafted[i] == token)
        below = [step.drafted[i] for i, parent in enumerate(step.parents) if parent == at]
        assert step.token not in below, "it was drafted and should have been accepted"
        assert step.kind == ("resampled" if below else "bonus")
    assert kinds == ({"bonus"} if name == "none" else {"bonus", "resampled"})


def test_steps_are_told_as_text():
    [first, _] = results("planned")
    for step in first.metrics.trace:
        piece = model().tokenizer.piece
        assert step.drafted_text == tuple(piece(i) for i in step.drafted)
        assert step.accepted_text == step.drafted_text[: len(step.accepted)]
        assert step.token_text == piece(step.token)
    row = first.to_dict()["trace"][0]
    assert {"drafted", "accepted", "token", "kind", "token_text"} <= row.keys()


def test_nothing_is_recorded_unless_asked_for():
    state = jax.eval_shape(
        lambda target: decoding.init_state(target, NoDraft(), 1, 32, 16), tiny.fixture_model()
    )
    assert state.trace is None
    with tiny.hurried_compiler():
        [result] = model().generate(tiny.prompts()[0], max_new_tokens=4)
    assert result.metrics.trace is None
    assert "trace" not in result.to_dict()
