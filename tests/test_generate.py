"""`LanguageModel.generate` and `.stream`: forms of prompts, stop strings, streams, results, refusals."""

import functools
import json
import shutil
import string
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax import CapacityError, ConfigError, LanguageModel
from tests import markov, paths, tiny

SPM = paths.COPIED / "tokenizers" / "spm-tiny"
PROMPT = "The market rose in the last week"
OTHER = "He said that the company would"
NEW_TOKENS = 24
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture(autouse=True)
def hurry():
    with tiny.hurried_compiler():
        yield


@functools.cache
def model() -> LanguageModel:
    """tiny-fp16 with its tokenizer and a made-up chat template."""
    path = paths.fixture("tiny-fp16")
    return specjax.load(path, dtype="float32", chat_template=TEMPLATE)


@functools.cache
def plain():
    """What the model says after `PROMPT`."""
    return model().generate({"text": PROMPT}, max_new_tokens=NEW_TOKENS)[0]


def generate(prompts, drafter="none", **options):
    return model().generate(prompts, drafter, **{"max_new_tokens": NEW_TOKENS, **options})


def test_result_of_a_text():
    result = plain()
    assert result.id == 0
    assert result.input_ids == model().tokenizer.encode(PROMPT)
    assert result.text == model().decode(result.output_ids)
    assert len(result.output_ids) == result.metrics.new_tokens == NEW_TOKENS
    assert result.finish_reason == "length"
    row = result.to_dict()
    assert set(row) >= {
        *("id", "input_ids", "output_ids", "text", "finish_reason", "new_tokens", "num_spec_steps"),
        *("mean_acceptance_length", "acceptance_histogram", "draft_acceptance_rate"),
        *("prefill_ms", "decode_ms", "compile_ms", "tokens_per_s", "batch_size"),
    }


def test_forms_of_prompts_and_their_precedence():
    """Token ids before messages before raw text before a user turn; other fields are ignored."""
    ids = model().tokenizer.encode(PROMPT)
    turn = model().tokenizer.encode(f"<user>{PROMPT}<assistant>")
    chat = model().tokenizer.encode(f"<system>x<user>{PROMPT}<assistant>")
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": PROMPT}]
    encode = model().encode
    assert encode(ids) == encode({"input_ids": ids}) == encode({"text": PROMPT}) == ids
    assert encode(PROMPT) == encode({"prompt": PROMPT}) == turn
    assert encode({"messages": messages}) == chat
    row = {"id": 7, "prompt": "a", "text": PROMPT, "category": "x"}
    assert encode(row) == ids
    assert encode({**row, "messages": messages}) == chat
    assert encode({**row, "messages": messages, "input_ids": ids[:3]}) == ids[:3]


def test_one_prompt_or_a_list():
    ids = model().tokenizer.encode(PROMPT)
    single = generate(ids)
    assert len(single) == 1
    assert single[0].output_ids == plain().output_ids
    both = generate([{"text": OTHER}, ids], batch_size=4, ids=["a", "b"])
    assert [result.id for result in both] == ["a", "b"]
    assert both[1].output_ids == plain().output_ids
    assert generate([]) == []


def test_results_are_ordered_and_batches_give_the_same():
    prompts = [{"text": OTHER}, {"text": PROMPT}, {"text": PROMPT[:12]}]
    together = generate(prompts, batch_size=2)
    assert [result.id for result in together] == [0, 1, 2]
    for prompt, result in zip(prompts, together, strict=True):
        assert generate(prompt)[0].output_ids == result.output_ids
    assert {result.metrics.batch_size for result in together} == {2}


@pytest.mark.parametrize(
    "spec", ["ngram", {"kind": "ngram", "draft_depth": 3, "ngram_min": 1}, "self"]
)
def test_drafters_by_name_and_by_dict_give_the_same_text(spec):
    result = generate({"text": PROMPT}, spec)[0]
    assert result.output_ids == plain().output_ids
    assert result.metrics.num_draft_tokens > 0


def test_eagle_head_by_path():
    spec = {"kind": "eagle", "model": str(paths.fixture("eagle2-tiny"))}
    spec |= {"draft_depth": 2, "topk": 4, "num_nodes": 8}
    result = generate({"text": PROMPT}, spec)[0]
    assert result.output_ids == plain().output_ids
    assert result.metrics.mean_acceptance_length > 1


def spanning() -> str:
    """A string of the plain text that begins in one token and ends in the next, and occurs there first."""
    ids, text = plain().output_ids, plain().text
    for at in range(12, len(ids) - 2):
        begin, end = len(model().decode(ids[:at])), len(model().decode(ids[: at + 1]))
        candidate = text[begin - 2 : begin + 2]
        if end >= begin + 2 and text.find(candidate) == begin - 2:
            return candidate
    raise AssertionError("the model repeats itself too soon")


@pytest.mark.parametrize("drafter", ["none", "ngram"])
def test_stop_strings_cut_the_text_and_keep_the_tokens_up_to_them(drafter):
    stop = spanning()
    result = generate({"text": PROMPT}, drafter, stop=(stop, "never said"))[0]
    assert result.finish_reason == "stop"
    assert result.text == plain().text[: plain().text.index(stop)]
    count = len(result.output_ids)
    assert result.output_ids == plain().output_ids[:count]
    assert stop in model().decode(result.output_ids)
    assert stop not in model().decode(result.output_ids[:-1])
    assert result.metrics.new_tokens == count


def test_stop_strings_in_batches():
    stop = spanning()
    prompts = [{"text": OTHER}, {"text": PROMPT}, {"text": PROMPT[:12]}]
    together = generate(prompts, stop=(stop,), batch_size=2)
    for prompt, result in zip(prompts, together, strict=True):
        alone = generate(prompt, stop=(stop,))[0]
        assert (result.text, result.output_ids) == (alone.text, alone.output_ids)
        assert result.finish_reason == alone.finish_reason
    assert together[1].finish_reason == "stop"


def test_a_stop_string_that_does_not_occur_changes_nothing():
    result = generate({"text": PROMPT}, stop=("never said",))[0]
    assert (result.text, result.finish_reason) == (plain().text, "length")


def test_one_string_as_stop_is_one_stop_string():
    stop = spanning()
    assert generate({"text": PROMPT}, stop=stop)[0].text == plain().text[: plain().text.index(stop)]


@pytest.mark.parametrize("drafter", ["none", "ngram"])
@pytest.mark.parametrize("with_stop", [False, True])
def test_a_stream_is_the_text_in_pieces(drafter, with_stop):
    options = {"stop": (spanning(),)} if with_stop else {}
    whole = generate({"text": PROMPT}, drafter, **options)[0]
    events = list(model().stream({"text": PROMPT}, drafter, max_new_tokens=NEW_TOKENS, **options))
    assert "".join(event.text for event in events) == whole.text
    assert len(events) > 2
    assert all(event.result is None for event in events[:-1])
    last = events[-1].result
    assert (last.text, last.output_ids) == (whole.text, whole.output_ids)
    assert last.finish_reason == whole.finish_reason


def test_streams_never_show_half_a_character_or_the_start_of_a_stop_string():
    stop = spanning()
    sent = ""
    for event in model().stream({"text": PROMPT}, max_new_tokens=NEW_TOKENS, stop=(stop,)):
        sent += event.text
        assert "\ufffd" not in event.text
        assert plain().text.startswith(sent)
    assert sent == plain().text[: plain().text.index(stop)]


def test_a_completion_begins_where_the_prompt_ends(tmp_path):
    """Decoders of SentencePiece strip a blank from the start of a text, but not from within it."""
    tokens = json.loads((SPM / "expected.json").read_text(encoding="utf-8"))["tokens"]
    said = [14, *(tokens.index(token) for token in ("\u2581\u2581\u2581\u2581", "re", "st")), 2]
    folder = markov.write(tmp_path / "m", 700, markov.chain(*said), eos_token_id=2)
    shutil.copy(SPM / "tokenizer.model", folder)
    indented = specjax.load(folder)
    row = {"text": "in the\n"}
    for stop in (None, "<|im_end|>", ["x", "x"]):
        events = list(indented.stream(row, max_new_tokens=8, stop=stop))
        assert "".join(event.text for event in events) == "    rest"
    [result] = indented.generate(row, max_new_tokens=8, trace=True)
    assert events[-1].result.text == result.text == "    rest"
    assert events[-1].result.output_ids == result.output_ids == said[1:]
    assert [step.token_text for step in result.metrics.trace][-3:] == ["re", "st", "</s>"]


def test_max_length_bounds_prompt_and_new_tokens():
    size = len(plain().input_ids)
    result = generate({"text": PROMPT}, max_length=size + 5)[0]
    assert result.output_ids == plain().output_ids[:5]
    assert result.finish_reason == "length"


def test_eos_ends_a_generation_unless_it_is_ignored(monkeypatch):
    """The model never says </s> by itself: another token of its text is declared to be the end."""
    ids = plain().output_ids
    at = next(i for i in range(6, NEW_TOKENS) if ids[i] not in ids[:i])
    other = replace(model().config, eos_token_ids=(1, ids[at]))
    monkeypatch.setattr(model(), "config", other)
    stopped = generate({"text": PROMPT})[0]
    assert stopped.output_ids == ids[: at + 1]
    assert stopped.finish_reason == "stop"
    assert generate({"text": PROMPT}, ignore_eos=True)[0].output_ids == ids


def test_sampling_options_reach_the_engine():
    def sampled(top_k=999, **settings):
        return generate({"text": PROMPT}, temperature=1.5, top_k=top_k, **settings)[0].output_ids

    assert sampled(seed=3) == sampled(seed=3)
    assert sampled(seed=3) != sampled(seed=4)
    assert sampled(top_k=1) == plain().output_ids


@pytest.mark.parametrize("temperature", [1e-10, 1e-38, 1e-45])
def test_the_limit_of_small_temperatures_is_greedy_decoding(temperature):
    assert generate({"text": PROMPT}, temperature=temperature)[0].output_ids == plain().output_ids


def test_any_seed_and_any_top_k():
    def sampled(**settings):
        options = {"temperature": 1.5, "top_k": 999, "max_new_tokens": 8}
        return tuple(generate({"text": PROMPT}, **options | settings)[0].output_ids)

    seeds = [0, -1, 2**32, 2**32 - 1, 2**63, 2**64 - 1, 10**40]
    assert len({sampled(seed=seed) for seed in seeds}) == len(seeds)
    assert sampled(top_k=99_999_999_999) == sampled(top_k=1024)


def test_new_tokens_end_with_the_context():
    ids = plain().input_ids
    [result] = generate([*ids, *[5] * (2046 - len(ids))], max_new_tokens=10**30)
    assert (len(result.output_ids), result.finish_reason) == (2, "length")


def test_request_numbers_are_all_different():
    for wrong in ([1, 1], [1], [0, -1], [0, 2**32]):
        with pytest.raises(ConfigError, match="2 different numbers below"):
            list(model().generate_iter([[1], [2]], request_ids=wrong))


def test_random_streams_follow_the_requests_numbers():
    """A resumed run, which lacks the first rows, continues with the same texts."""
    prompts = [{"text": OTHER}, {"text": PROMPT}]
    settings = {"temperature": 1.5, "top_k": 999, "max_new_tokens": NEW_TOKENS, "batch_size": 1}
    both = dict(model().generate_iter(prompts, **settings))
    rest = dict(model().generate_iter(prompts[1:], request_ids=[1], **settings))
    assert rest[0].output_ids == both[1].output_ids
    assert dict(model().generate_iter(prompts[1:], **settings))[0].output_ids != rest[0].output_ids


def test_numbers_and_arrays_of_numpy_and_jax_are_taken_as_python_s():
    ids = model().encode({"text": PROMPT})
    numbers = {"seed": -5, "top_k": 999, "max_new_tokens": NEW_TOKENS, "stop_token_ids": [1]}
    [expected] = model().generate(ids, temperature=1.5, **numbers)
    options = {"temperature": np.float32(1.5), "stop_token_ids": np.array([1])}
    options |= {n: np.int32(v) for n, v in numbers.items() if n != "stop_token_ids"}
    for prompt in (np.array(ids, np.int16), jnp.array(ids)):
        [found] = model().generate(prompt, **options)
        assert found.output_ids == expected.output_ids and found.input_ids == ids
    assert json.loads(json.dumps(found.to_dict()))["output_ids"] == expected.output_ids


REFUSED = [
    ({"max_new_tokens": 0}, ConfigError, "max_new_tokens=0"),
    ({"batch_size": 0}, ConfigError, "batch_size=0"),
    ({"max_new_tokens": 1.5}, ConfigError, "max_new_tokens=1.5"),
    ({"max_new_tokens": True}, ConfigError, "max_new_tokens=True"),
    ({"max_length": 0}, ConfigError, "max_length=0"),
    ({"batch_size": "2"}, ConfigError, "batch_size='2'"),
    ({"seed": 1.0}, ConfigError, "seed=1.0"),
    ({"seed": None}, ConfigError, "seed=None"),
    ({"ignore_eos": "no"}, ConfigError, "ignore_eos='no'"),
    ({"temperature": float("nan")}, ConfigError, "temperature=nan"),
    ({"temperature": None}, ConfigError, "temperature=None"),
    ({"top_p": float("nan")}, ConfigError, "top_p=nan"),
    ({"top_k": 2.5}, ConfigError, "top_k=2.5"),
    ({"stop": 5}, ConfigError, "stop=5"),
    ({"stop_token_ids": [1024]}, ConfigError, "1024 is no token id"),
    ({"stop_token_ids": [True]}, ConfigError, r"stop_token_ids\[0\]=True"),
    ({"stop_token_ids": "5"}, ConfigError, "stop_token_ids: expected .* found str"),
    ({"temperature": np.bool_(True)}, ConfigError, "temperature=np.True_"),
    ({"temperature": b"1"}, ConfigError, "temperature=b'1'"),
    ({"acceptance": None}, ConfigError, "acceptance=None"),
    ({"prompts": 5}, ConfigError, "prompts: expected text.* found int"),
    ({"prompts": None}, ConfigError, "prompts: expected text.* found NoneType"),
    ({"prompts": b"ab"}, ConfigError, "prompts: expected text.* found bytes"),
    ({"ids": []}, ConfigError, "ids: 0 names for 1 prompts"),
    ({"ids": ["a", "b"]}, ConfigError, "ids: 2 names for 1 prompts"),
    ({"prompts": {"text": 5}}, ConfigError, "text: expected a string, found int"),
    ({"prompts": {"prompt": ["a"]}}, ConfigError, "prompt: expected a string, found list"),
    ({"prompts": {"text": "a\udcff"}}, ConfigError, "half a surrogate pair"),
    ({"prompts": {"input_ids": "12"}}, ConfigError, "input_ids: expected .* found str"),
    ({"prompts": {"input_ids": [1, 2.5]}}, ConfigError, r"input_ids\[1\]=2.5"),
    ({"prompts": [{"input_ids": 3}]}, ConfigError, "input_ids: expected .* found int"),
    ({"prompts": {"messages": [{"role": "user"}]}}, ConfigError, "content is missing"),
    ({"temperature": -1.0}, ConfigError, "temperature=-1"),
    ({"top_p": 0.0}, ConfigError, "top_p=0"),
    ({"acceptance": "typo"}, ConfigError, "acceptance='typo'"),
    ({"stop": ("a", "")}, ConfigError, "empty stop string"),
    ({"max_length": 3}, CapacityError, "max_length is 3"),
    ({"prompts": {"input_ids": []}}, CapacityError, "prompt is empty"),
    ({"prompts": {"text": ""}}, CapacityError, "prompt is empty"),
    ({"prompts": " "}, CapacityError, "prompt is empty"),
    ({"prompts": {"messages": []}}, ConfigError, "messages is empty"),
    ({"prompts": {"input_ids": [5, 1024]}}, CapacityError, "1024, outside the vocabulary of 1024"),
    ({"prompts": {"input_ids": [-1]}}, CapacityError, "-1, outside"),
    ({"prompts": {"question": "x"}}, ConfigError, "one of input_ids, messages, text, prompt"),
    ({"prompts": [1] * 2048}, CapacityError, "2048 tokens"),
    ({"drafter": "typo"}, ConfigError, "drafter='typo'"),
    ({"drafter": {"kind": "ngram", "depth": 3}}, ConfigError, "no option 'depth'"),
    ({"drafter": {"draft_depth": 3}}, ConfigError, "'kind'"),
    ({"drafter": {"kind": "ngram", "draft_depth": 0}}, ConfigError, "draft_depth=0"),
    ({"drafter": {"kind": "ngram", "draft_depth": 10**9}}, ConfigError, "at most so many"),
    ({"drafter": {"kind": "ngram", "ngram_max": 2.5}}, ConfigError, "ngram_max=2.5"),
    ({"drafter": {"kind": "self", "draft_depth": "3"}}, ConfigError, "draft_depth='3'"),
    ({"drafter": {"kind": "eagle", "model": "x", "topk": 1025}}, ConfigError, "topk=1025 exceeds"),
    (
        {"drafter": {"kind": "eagle", "model": "x", "num_nodes": None}},
        ConfigError,
        "num_nodes=None",
    ),
    ({"drafter": {"kind": "lm"}}, ConfigError, "needs the option 'model'"),
    ({"drafter": "eagle"}, ConfigError, "no head ships"),
    ({"drafter": {"kind": "self", "scheme": "w4a8"}}, ConfigError, "needs quantized weights"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED)
def test_bad_input_is_refused_with_its_name(arguments, error, message):
    arguments = {"prompts": {"text": PROMPT}, **arguments}
    before = model().programs.num_compilations
    with pytest.raises(error, match=message):
        generate(**arguments)
    assert model().programs.num_compilations == before


def test_an_unknown_option_is_refused_by_name():
    with pytest.raises(TypeError, match="max_tokens"):
        generate({"text": PROMPT}, max_tokens=3)


def test_a_model_without_tokenizer_takes_and_gives_token_ids():
    bare = LanguageModel(name="bare", config=model().config, module=model().module)
    result = bare.generate(plain().input_ids, max_new_tokens=4)[0]
    assert result.output_ids == plain().output_ids[:4]
    assert result.text is None
    with pytest.raises(ConfigError, match="no tokenizer"):
        bare.generate("text")
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        bare.generate([1, 2], stop=("x",))


def test_the_fixture_speaks_plain_text():
    """What the stop-string tests rest on."""
    assert set(plain().text) <= set(string.printable)
