"""Serving requests: buckets, one compilation and one dispatch per shape, refilled slots, ends, determinism."""

import functools
import itertools

import jax
import numpy as np
import pytest

from specjax.drafters.eagle import eagle
from specjax.drafters.lm import LM
from specjax.drafters.none import NoDraft
from specjax.engine import decode as decoding
from specjax.engine import engine as engines
from specjax.engine.engine import Completion, Programs, Progress, Request, bucket, cache_slots
from specjax.engine.metrics import Metrics
from specjax.engine.program import Program
from specjax.errors import CapacityError
from specjax.pallas import device
from specjax.pallas.matmul import tiles
from tests import planned, tiny

CONFIG = tiny.config(vocab_size=64, num_layers=1, max_position_embeddings=400)


def prompt_of(size: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, size]).integers(0, 64, size).tolist()


PROMPTS = [prompt_of(size) for size in (5, 12, 9, 3, 16, 7)]
LIMITS = (14, 3, 9, 16, 11, 16)
PROGRAMS = Programs()


@pytest.fixture(autouse=True)
def hurry():
    with tiny.hurried_compiler():
        yield


@functools.cache
def target():
    return tiny.model(CONFIG, seed=2)


@functools.cache
def texts() -> list[list[int]]:
    return tiny.greedy(target(), PROMPTS, 24)


def new_tokens(row: int, count: int | None = None) -> list[int]:
    """What plain greedy decoding gives for a prompt."""
    begin = len(PROMPTS[row])
    return texts()[row][begin : None if count is None else begin + count]


def drafter(*plan: int):
    return planned.planned(texts(), plan or (2, 0, 4, 1, 3), vocab_size=CONFIG.vocab_size)


@functools.cache
def draft_model():
    return LM(model=tiny.noisy(target(), 0.3), draft_depth=2)


def run(proposer, jobs, batch: int = 1, programs=PROGRAMS, seed=0, stop_ids=(), **settings):
    """Completions in the order of the jobs; `settings` are those of sampling, and of `Engine.run`."""
    sampling = {k: settings.pop(k) for k in ("temperature", "top_k", "top_p") if k in settings}
    runner = tiny.engine(target(), proposer, programs, seed=seed, stop_ids=stop_ids, **sampling)
    return tiny.run(runner, jobs, batch, **settings)


class Counting:
    """A program that counts its dispatches."""

    def __init__(self, program: Program):
        self.program, self.calls = program, 0

    def __call__(self, **arguments):
        self.calls += 1
        return self.program(**arguments)

    def __getattr__(self, name):
        return getattr(self.program, name)


@pytest.mark.parametrize(
    ("size", "expected"), [(1, 16), (16, 16), (17, 24), (24, 24), (25, 32), (33, 48), (769, 1024)]
)
def test_buckets(size, expected):
    assert bucket(size) == expected
    assert bucket(expected) == expected


def test_caches_on_gpus_are_of_whole_blocks():
    assert cache_slots(30) == 32
    with device.targeting(tiles.typical((9, 0))):
        assert [cache_slots(size) for size in (1, 30, 64, 65, 90, 130)] == [
            64,
            64,
            64,
            128,
            128,
            192,
        ]


def test_nothing_is_compiled_again_within_a_bucket():
    """Other prompts, lengths, seeds, temperatures and stop ids: the same executables, traced once."""
    programs, traces = Programs(), []

    def counted(*args, **kwargs):
        traces.append(1)
        return decoding.decode(*args, **kwargs)

    @functools.wraps(decoding.decode)
    def decode(target, drafter, state, stop_ids, max_steps, sampling, acceptor):
        return counted(target, drafter, state, stop_ids, max_steps, sampling, acceptor)

    programs.decode = Program(decode, donate=("state",), static=("acceptor",))
    runs = [
        (5, {}),
        (8, {"seed": 3}),
        (9, {"temperature": 0.3}),
        (4, {"stop_ids": (5,)}),
        (3, {"stop_ids": (9,), "seed": 4}),
    ]
    for index, (size, settings) in enumerate(runs):
        jobs = tiny.requests([prompt_of(size, 1)], 16)
        run(draft_model(), jobs, programs=programs, **{"temperature": 1.0, **settings})
        if index == 0:
            compiled, spent = programs.num_compilations, programs.compile_ms
    assert compiled == 3  # init, prefill, decode; a batch of one inserts nothing
    assert programs.num_compilations == compiled
    assert programs.compile_ms == spent
    assert len(traces) == 1


def test_the_buckets_of_prompt_and_limit_decide_all_shapes():
    """Whatever the lengths within the buckets, so that the first request of a bucket compiles for all."""
    runner = tiny.engine(target(), NoDraft(), PROGRAMS)
    plans = {
        runner.plan(tiny.requests([[1] * size], limit))
        for size in (1, 5, 12, 16)
        for limit in (9, 16)
    }
    assert len(plans) == 1


@pytest.mark.parametrize(("batch", "dispatches"), [(1, 2), (4, 1)])
def test_one_dispatch_per_generation_when_there_are_only_stop_ids(batch, dispatches):
    programs = Programs()
    programs.decode = Counting(PROGRAMS.decode)
    programs.prefill = Counting(PROGRAMS.prefill)
    stop = (new_tokens(0)[5],)
    if batch == 1:
        # One after the other: two requests, but a queue is looked at while something waits.
        for row in range(2):
            run(drafter(), tiny.requests([PROMPTS[row]], 16), programs=programs, stop_ids=stop)
    else:
        run(drafter(), tiny.requests(PROMPTS[:4], 16), 4, programs=programs, stop_ids=stop)
    assert programs.decode.calls == programs.prefill.calls == dispatches


def test_slots_are_refilled_and_batches_give_what_single_requests_give():
    jobs = tiny.requests(PROMPTS, list(LIMITS))
    together = run(drafter(), jobs, 4)
    for row, completion in enumerate(together):
        assert completion.output_ids == new_tokens(row, LIMITS[row])
        assert completion.metrics.batch_size == 4
        alone = run(drafter(), [jobs[row]])[0]
        assert alone.output_ids == completion.output_ids
        assert alone.metrics.acceptance_histogram == completion.metrics.acceptance_histogram
        assert alone.metrics.num_spec_steps == completion.metrics.num_spec_steps


def test_more_slots_than_requests():
    done = run(drafter(), tiny.requests(PROMPTS[:4], 6), 64)
    assert tiny.outputs(done) == [new_tokens(row, 6) for row in range(4)]
    assert run(drafter(), [], 4) == []


def test_generation_ends_at_the_first_stop_token():
    """The stop token is returned and counted, what the step accepted beyond it is not."""
    tokens = new_tokens(0)
    at = next(i for i in range(5, 12) if tokens[i] not in tokens[:i])
    done = run(drafter(4), tiny.requests(PROMPTS[:4], 16), 4, stop_ids=(tokens[at],))
    for row, completion in enumerate(done):
        output = new_tokens(row, 16)
        stopped = tokens[at] in output
        expected = output[: output.index(tokens[at]) + 1] if stopped else output
        assert completion.output_ids == expected
        assert completion.stopped == stopped
        assert completion.metrics.new_tokens == len(expected)
    assert done[0].stopped


def test_a_stop_token_as_first_token():
    done = run(drafter(), tiny.requests(PROMPTS[:2], 16), stop_ids=(new_tokens(0)[0],))
    assert done[0].output_ids == new_tokens(0, 1)
    assert done[0].stopped
    assert done[0].metrics.num_spec_steps == 0
    assert done[0].metrics.mean_acceptance_length is None
    assert len(done[1].output_ids) > 1


def test_a_limit_of_one_token():
    done = run(drafter(), tiny.requests(PROMPTS[:3], [1, 1, 4]), 2)
    assert tiny.outputs(done) == [new_tokens(0, 1), new_tokens(1, 1), new_tokens(2, 4)]
    assert not done[0].stopped
    assert done[0].metrics.num_spec_steps == 0
    assert done[0].metrics.tokens_per_s is None


def test_metrics_add_up():
    """Acceptance is measured before the last step is cut at the limit."""
    done = run(drafter(2, 0, 4, 1, 3), tiny.requests(PROMPTS, list(LIMITS)), 4)
    for completion in done:
        m = completion.metrics
        accepted = sum(count * steps for count, steps in enumerate(m.acceptance_histogram))
        assert sum(m.acceptance_histogram) == m.num_spec_steps
        assert m.num_accepted_draft_tokens == accepted
        assert m.num_draft_tokens == 4 * m.num_spec_steps
        assert m.draft_acceptance_rate == accepted / m.num_draft_tokens
        assert m.mean_acceptance_length == 1 + accepted / m.num_spec_steps
        assert m.new_tokens == len(completion.output_ids) <= 1 + accepted + m.num_spec_steps
        assert m.prefill_ms > 0 and m.decode_ms > 0 and m.tokens_per_s > 0
    full = run(drafter(4), tiny.requests(PROMPTS[:1], 9))[0].metrics
    assert full.acceptance_histogram == (0, 0, 0, 0, 2)
    assert full.mean_acceptance_length == 5


def test_metrics_of_a_request_that_drafted_nothing():
    plain = run(NoDraft(), tiny.requests(PROMPTS[:1], 9))[0].metrics
    assert plain.acceptance_histogram == (8,)
    assert plain.mean_acceptance_length == 1
    assert plain.draft_acceptance_rate is None
    optional = {"trace", "layer_runs", "inner_acceptance_histogram", "quarantine"}
    assert set(plain.to_dict()) >= {*Metrics.__dataclass_fields__, "tokens_per_s"} - optional


def test_compilation_is_timed_apart():
    jax.clear_caches()  # XLA's own executables, which would make compiling a look-up
    programs = Programs()
    first = run(NoDraft(), tiny.requests(PROMPTS[:1], 9), programs=programs)[0].metrics
    second = run(NoDraft(), tiny.requests(PROMPTS[:1], 9), programs=programs)[0].metrics
    assert first.compile_ms > 0
    assert second.compile_ms == 0
    assert first.prefill_ms + first.decode_ms < first.compile_ms


def test_looking_in_between_changes_nothing():
    runner = tiny.engine(target(), drafter(), PROGRAMS)
    events = list(runner.run(tiny.requests(PROMPTS[:1], 16), steps_per_look=2))
    assert all(isinstance(event, Progress) for event in events[:-1])
    assert isinstance(events[-1], Completion)
    assert len(events) > 3
    for before, after in itertools.pairwise(events):
        assert after.output_ids[: len(before.output_ids)] == before.output_ids
    assert events[-1].output_ids == new_tokens(0, 16)


def test_the_callers_stop_ends_a_request_and_frees_its_slot():
    """Here: after the tokens 0..4 of a request, whatever has been generated beyond."""
    done = run(
        drafter(),
        tiny.requests(PROMPTS, 16),
        2,
        should_stop=lambda job, tokens: 5 if len(tokens) >= 5 and job.request_id % 2 else None,
    )
    for row, completion in enumerate(done):
        assert completion.stopped == bool(row % 2)
        assert completion.output_ids == new_tokens(row, 5 if row % 2 else 16)
        assert completion.metrics.new_tokens == len(completion.output_ids)


@pytest.mark.parametrize(
    "proposer", [pytest.param(draft_model, marks=pytest.mark.slow), NoDraft], ids=["lm", "none"]
)
def test_same_seed_same_tokens_whatever_the_batch_and_the_order(proposer):
    settings = {"temperature": 1.0}
    jobs = tiny.requests(PROMPTS, list(LIMITS))
    first = tiny.outputs(run(proposer(), jobs, 4, **settings))
    assert tiny.outputs(run(proposer(), jobs, 4, **settings)) == first
    assert tiny.outputs(run(proposer(), jobs[::-1], 4, **settings)) == first[::-1]
    assert tiny.outputs(run(proposer(), jobs[2:4], **settings)) == first[2:4]
    other = tiny.outputs(run(proposer(), jobs, 4, seed=1, **settings))
    assert all(a != b for a, b in zip(first, other, strict=True) if len(a) > 3)
    assert first != [new_tokens(row, LIMITS[row]) for row in range(len(PROMPTS))]


def test_prompts_longer_than_a_chunk_beside_short_ones():
    """The head's last pair waits across chunks in which a short prompt has no tokens."""
    lengths = (engines.MAX_CHUNK + 1, 20, engines.MAX_CHUNK)
    prompts = [prompt_of(size) for size in lengths]
    expected = tiny.greedy(target(), prompts, 8)
    head = eagle(tiny.head(tiny.config(vocab_size=64)), draft_depth=2, topk=2, num_nodes=6)
    done = run(head, tiny.requests(prompts, 8), 3)
    for completion, prompt, text in zip(done, prompts, expected, strict=True):
        assert completion.output_ids == text[len(prompt) :]


@pytest.mark.parametrize(
    ("prompt", "limit", "message"),
    [
        ([], 4, "request 0: the prompt is empty"),
        ([1], 0, "request 0: max_new_tokens=0; at least 1"),
        ([1] * 390, 20, "390 prompt tokens.*20.*max_position_embeddings=400.*shorten"),
    ],
)
def test_requests_that_cannot_be_served_are_refused_before_anything_runs(prompt, limit, message):
    programs = Programs()
    jobs = [Request(request_id=0, input_ids=prompt, max_new_tokens=limit)]
    with pytest.raises(CapacityError, match=message):
        run(drafter(), jobs, programs=programs)
    assert programs.num_compilations == 0


def test_a_request_may_fill_all_positions():
    prompt = prompt_of(390)
    expected = tiny.greedy(target(), [prompt], 10)[0][390:]
    assert run(NoDraft(), tiny.requests([prompt], 10))[0].output_ids == expected
