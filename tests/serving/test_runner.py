"""The runner on a small model and on engines that fail: answers equal those alone, ends, prefixes, counters."""

import functools
import threading

import jax
import numpy as np
import pytest

from specjax.drafters.ngram import Ngram
from specjax.engine.slot_engine import SlotEngine, SlotOptions
from specjax.errors import CapacityError, ConfigError, RunnerClosedError
from specjax.serving.runner import EngineRunner
from specjax.serving.types import Request, SamplingParams
from tests import tiny

SIZES = dict(num_slots=3, widths=(8, 64), max_steps=4, max_stop_ids=4, max_biased=4)
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(autouse=True, scope="module")
def hurry():
    with tiny.hurried_compiler():
        yield


@functools.cache
def target():
    config = tiny.config(vocab_size=32, num_layers=1, max_position_embeddings=2048)
    return tiny.model(config, seed=3)


def prompt_of(size: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng([seed, size]).integers(0, 32, size).tolist())


class Collected:
    """Events of one request."""

    def __init__(self):
        self.events, self.ended = [], threading.Event()

    def __call__(self, event):
        self.events.append(event)
        if event.finish_reason is not None:
            self.ended.set()

    @property
    def tokens(self):
        return [token for event in self.events for token in event.tokens]

    def joined(self, name):
        return [x for event in self.events for x in getattr(event, name)]

    @property
    def last(self):
        return self.events[-1]

    def wait(self):
        assert self.ended.wait(120)
        assert sum(event.finish_reason is not None for event in self.events) == 1
        return self


def start(drafter, model_len=320, **options):
    sizes = {**SIZES, "max_model_len": model_len, **options}
    engine = SlotEngine(target(), drafter, SlotOptions(**sizes))
    runner = EngineRunner(engine, vocab_size=32)
    runner.start()
    assert runner.wait_ready(300)
    return runner


@pytest.fixture(scope="module")
def shared():
    runner = start(Ngram(draft_depth=3), max_logprobs=2, prompt_logprobs=True)
    yield runner
    runner.close()


def ask(runner, name, prompt, limit, sampling=GREEDY, **fields):
    found = Collected()
    fields = {"reuse_prefix": False, **fields}
    request = Request(
        request_id=name, prompt_ids=prompt, max_tokens=limit, sampling=sampling, **fields
    )
    runner.submit(request, found)
    return found


def plain(prompt, count):
    return tiny.greedy(target(), [prompt], count)[0][len(prompt) :]


MIXED = (
    dict(sampling=GREEDY),
    dict(sampling=SamplingParams(temperature=1.0), seed=3),
    dict(sampling=SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.05), seed=4),
    dict(sampling=GREEDY, speculation="off"),
    dict(sampling=SamplingParams(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.4)),
    dict(sampling=SamplingParams(temperature=1.2, presence_penalty=1.0, logit_bias={3: 2.5})),
    dict(sampling=SamplingParams(temperature=0.8), speculation="off", seed=9),
)


def mixed_load(runner, lengths, limits, cancelled=()):
    """Requests of all kinds together, and each alone; returns both lists."""
    fields = [MIXED[i % len(MIXED)] for i in range(len(lengths))]
    jobs = [(prompt_of(n), limit, f) for n, limit, f in zip(lengths, limits, fields, strict=True)]
    together = [ask(runner, f"t{i}", p, n, **f) for i, (p, n, f) in enumerate(jobs)]
    for index in cancelled:
        runner.cancel(f"t{index}")
    for one in together:
        one.wait()
    alone = [ask(runner, f"a{i}", p, n, **f).wait() for i, (p, n, f) in enumerate(jobs)]
    return together, alone


def check_load(runner, lengths, limits, cancelled=()):
    before = runner.stats().num_compilations
    together, alone = mixed_load(runner, lengths, limits, cancelled)
    for index, (one, other) in enumerate(zip(together, alone, strict=True)):
        if index in cancelled:
            assert one.tokens == other.tokens[: len(one.tokens)]
        else:
            assert one.tokens == other.tokens, index
            assert len(one.tokens) == limits[index]
        if index % len(MIXED) in (0, 3) and lengths[index] < 100:
            assert other.tokens == plain(prompt_of(lengths[index]), limits[index])
    assert runner.stats().num_compilations == before
    assert runner.stats().running == runner.stats().waiting == 0


def test_requests_of_all_kinds_together_equal_themselves_alone(shared):
    made = []
    listen = lambda name, *_, **__: made.append(name) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 17)(1)
        assert made.pop()  # what is listened for is what JAX says
        lengths, limits = (3, 200, 9, 70, 40, 17, 33), (20, 12, 15, 18, 22, 9, 14)
        together, _ = mixed_load(shared, lengths, limits)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not made  # nothing compiles under load, the helpers of JAX included
    assert together[3].last.statistics.num_accepted_draft_tokens == 0
    check_load(shared, lengths, limits, cancelled=(1, 4))


def test_penalties_and_bias_are_those_of_plain_decoding_by_hand(shared):
    prompt, limit = prompt_of(12), 16
    params = SamplingParams(
        temperature=0.0,
        presence_penalty=0.5,
        frequency_penalty=0.7,
        repetition_penalty=1.4,
        logit_bias={5: 1.5, 7: -100},
    )
    text = list(prompt)
    for _ in range(limit):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(text)] = text
        logits = np.asarray(tiny._full_logits(target(), padded))[0, len(text) - 1].astype(float)
        logits[5] += 1.5
        logits[7] -= 100
        counts = np.bincount(text[len(prompt) :], minlength=32)
        seen = np.bincount(text, minlength=32) > 0
        logits = np.where(seen, np.where(logits > 0, logits / 1.4, logits * 1.4), logits)
        text.append(int(np.argmax(logits - 0.7 * counts - 0.5 * (counts > 0))))
    for speculation in ("auto", "off"):
        found = ask(shared, speculation, prompt, limit, params, speculation=speculation).wait()
        assert found.tokens == text[len(prompt) :]


def test_logprobs_are_those_of_a_whole_pass(shared):
    prompt, limit = prompt_of(70), 9
    found = ask(shared, "l", prompt, limit, logprobs=2, prompt_logprobs=1).wait()
    text = [*prompt, *found.tokens]
    logits = np.asarray(tiny._full_logits(target(), np.asarray([text], np.int32)))[0]
    wanted = np.asarray(jax.nn.log_softmax(logits.astype(np.float32), axis=-1))
    for place, rows, top in (
        (1, found.joined("prompt_logprobs"), 1),
        (len(prompt), found.joined("logprobs"), 2),
    ):
        assert [row.token for row in rows] == text[place : place + len(rows)]
        for at, row in enumerate(rows, place):
            assert row.logprob == pytest.approx(wanted[at - 1, text[at]], abs=1e-4)
            assert len(row.top) == top
            assert row.top[0][1] == pytest.approx(wanted[at - 1].max(), abs=1e-4)
    assert len(found.joined("prompt_logprobs")) == len(prompt) - 1
    assert len(found.joined("logprobs")) == len(found.joined("drafted")) == limit


def test_stop_ids_limits_deadlines_and_cancels_end_requests(shared):
    prompt = prompt_of(10)
    text = plain(prompt, 24)
    stop = text[6]
    ended = ask(shared, "stop", prompt, 24, stop_ids=[31, stop]).wait()
    assert ended.tokens == text[: text.index(stop) + 1] and ended.last.finish_reason == "stop"
    one = ask(shared, "one", prompt, 1).wait()
    assert one.tokens == text[:1] and one.last.finish_reason == "length"
    late = ask(shared, "late", prompt, 24, deadline=0.0).wait()
    assert late.last.finish_reason == "deadline" and not late.tokens
    gone = ask(shared, "gone", prompt, 300)
    shared.cancel("gone")
    assert gone.wait().last.finish_reason == "cancelled"
    shared.cancel("nobody")


def test_prefixes_are_reused_and_change_nothing(shared):
    first = ask(shared, "p1", prompt_of(90), 20, reuse_prefix=True).wait()
    turn = (*prompt_of(90), *first.tokens, *prompt_of(9, seed=5))
    again = ask(shared, "p2", turn, 20, reuse_prefix=True).wait()
    assert again.last.statistics.cached_tokens >= 100
    assert again.tokens == plain(turn, 20)
    elsewhere = ask(shared, "p3", turn, 20, reuse_prefix=True, namespace="key").wait()
    assert elsewhere.last.statistics.cached_tokens == 0
    assert elsewhere.tokens == again.tokens


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(prompt=()), "empty"),
        (dict(prompt=(32,)), "outside the vocabulary"),
        (dict(limit=0), "max_tokens"),
        (dict(limit=319), "max_model_len"),
        (dict(sampling=SamplingParams(min_p=2.0)), "min_p"),
        (dict(sampling=SamplingParams(temperature=-1.0)), "temperature"),
        (dict(sampling=SamplingParams(presence_penalty=float("nan"))), "presence_penalty"),
        (dict(sampling=SamplingParams(repetition_penalty=0.0)), "repetition_penalty"),
        (dict(sampling=SamplingParams(logit_bias={40: 1.0})), "logit_bias"),
        (dict(stop_ids=range(5)), "stop_ids"),
        (dict(logprobs=3), "at most 2"),
        (dict(speculation="on"), "speculation"),
        (dict(seed=1.5), "seed"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_queued(shared, fields, message):
    fields = {"prompt": (1, 2), "limit": 3, **fields}
    with pytest.raises((CapacityError, ConfigError), match=message):
        ask(shared, "x", fields.pop("prompt"), fields.pop("limit"), **fields)
    assert ask(shared, "x", (1, 2), 1).wait().tokens


class Fake:
    """An engine without a device: what fails in it, and when, is chosen."""

    def __init__(self, fails=None):
        self.options = SlotOptions(num_slots=1, max_model_len=64, widths=(8,))
        self.path_rows, self.num_compilations, self.fails = 1, 0, fails

    def _do(self, name):
        if self.fails == name:
            raise RuntimeError(f"{name} broke")

    def warm_up(self):
        self._do("warm_up")

    def take_in(self, *_, **__):
        self._do("take_in")

    def decode(self, *_):
        self._do("decode")
        raise AssertionError("not asked for here")


def test_a_failing_engine_fails_every_request_and_is_told():
    runner, told = EngineRunner(Fake("take_in"), vocab_size=32), []
    runner.on_failure(told.append)
    waiting = [ask(runner, str(i), (1, 2), 3) for i in range(3)]
    runner.start()
    for one in waiting:
        assert one.wait().last.finish_reason == "error"
        assert "take_in broke" in str(one.last.error)
    assert runner.drain(10) and not runner.ready
    runner.close()
    assert told == [runner.failure]
    assert runner.stats().finished == {"error": 3} and runner.stats().waiting == 0
    with pytest.raises(RunnerClosedError, match="failed"):
        ask(runner, "late", (1,), 1)


def test_a_failing_warm_up_is_raised_to_whoever_waits():
    runner = EngineRunner(Fake("warm_up"), vocab_size=32)
    runner.start()
    with pytest.raises(RuntimeError, match="warm_up broke"):
        runner.wait_ready(10)


def test_a_runner_that_drains_finishes_what_it_has_and_takes_no_more(shared):
    raising = Request(request_id="r", prompt_ids=(1, 2), max_tokens=9, sampling=GREEDY)
    shared.submit(raising, lambda event: 1 / 0)
    kept = ask(shared, "kept", prompt_of(10), 30)
    assert shared.drain(60)
    assert len(kept.tokens) == 30 and not shared.ready
    with pytest.raises(RunnerClosedError, match="shutting down"):
        ask(shared, "late", (1,), 1)
    assert shared.stats().finished["length"] > 0


def test_a_runner_that_never_started_ends_its_requests_when_it_closes():
    engine = SlotEngine(target(), Ngram(draft_depth=3), SlotOptions(max_model_len=64, **SIZES))
    runner = EngineRunner(engine, vocab_size=32)
    found = ask(runner, "early", (1, 2), 2)
    runner.close()
    assert [event.finish_reason for event in found.events] == ["cancelled"]
    assert runner.drain(0) and runner.stats().waiting == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.DRAFTERS)
def test_twelve_requests_on_three_slots_for_every_drafter(name):
    config = tiny.config(max_position_embeddings=2048)
    model = tiny.prepare(tiny.model(config))
    drafter = tiny.DRAFTERS[name](tiny.Parts(model))
    sizes = {**SIZES, "widths": (32, 128)}
    engine = SlotEngine(model, drafter, SlotOptions(max_model_len=1600, **sizes))
    runner = EngineRunner(engine, vocab_size=16)
    runner.start()
    assert runner.wait_ready(600)
    rng = np.random.default_rng(5)
    lengths = (3, 1500, 40, 9, 300, 90, 5, 33, 700, 12, 64, 128)
    jobs = [
        (tuple(rng.integers(0, 16, size).tolist()), 20, MIXED[i % len(MIXED)])
        for i, size in enumerate(lengths)
    ]
    before = runner.stats().num_compilations
    assert before == 7
    together = [ask(runner, f"t{i}", p, n, **f) for i, (p, n, f) in enumerate(jobs)]
    for index in (4, 8):
        runner.cancel(f"t{index}")
    for one in together:
        one.wait()
    alone = [ask(runner, f"a{i}", p, n, **f).wait() for i, (p, n, f) in enumerate(jobs)]
    for index, (one, other) in enumerate(zip(together, alone, strict=True)):
        wanted = other.tokens[: len(one.tokens)] if index in (4, 8) else other.tokens
        assert one.tokens == wanted, index
    for index in (0, 3):
        prompt = jobs[index][0]
        if MIXED[index]["sampling"] is GREEDY:
            assert alone[index].tokens == tiny.greedy(model, [prompt], 20)[0][len(prompt) :]
    turn = (*jobs[0][0], *alone[0].tokens, *jobs[2][0])
    fresh = ask(runner, "fresh", turn, 20).wait()
    first = ask(runner, "again", (*jobs[0][0], *alone[0].tokens), 2).wait()
    reused = ask(runner, "reused", turn, 20, reuse_prefix=True).wait()
    assert first.tokens and reused.last.statistics.cached_tokens >= 8
    assert reused.tokens == fresh.tokens == tiny.greedy(model, [turn], 20)[0][len(turn) :]
    assert runner.stats().num_compilations == before
    runner.close()
