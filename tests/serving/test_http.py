"""OpenAI's endpoints over a runner without an engine: answers, streams, log-probabilities, ends."""

import asyncio

import httpx2
import openai
import pytest

from specjax.serving.http import protocol
from specjax.serving.types import TokenLogprob
from tests.serving.http_client import ANSWER, Served, pieces, text_of, tokenizer


@pytest.fixture(scope="module")
def served():
    return Served()


def test_openai_client_reads_whole_answers_and_streams(served):
    async def ask():
        transport = httpx2.ASGITransport(served.app)
        async with httpx2.AsyncClient(transport=transport) as http:
            client = openai.AsyncOpenAI(api_key="x", base_url="http://test/v1", http_client=http)
            messages = [{"role": "user", "content": "Hi"}]
            whole = await client.chat.completions.create(model="tiny", messages=messages)
            stream = await client.chat.completions.create(
                model="tiny", messages=messages, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            text = await client.completions.create(model="tiny", prompt="Hi", max_tokens=3)
            models = [model.id async for model in client.models.list()]
            with pytest.raises(openai.NotFoundError, match=r"other.*supported: tiny"):
                await client.completions.create(model="other", prompt="Hi")
            return whole, chunks, text, models

    whole, chunks, text, models = asyncio.run(ask())
    new = len(tokenizer().encode(ANSWER, False)) + 1
    assert whole.choices[0].message.content == ANSWER
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens == new
    assert whole.id.startswith("chatcmpl-") and whole.object == "chat.completion"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert text.choices[0].finish_reason == "length" and text.usage.completion_tokens == 3
    assert text.choices[0].text == tokenizer().decode(tokenizer().encode(ANSWER, False)[:3])
    assert models == ["tiny"]


@pytest.mark.parametrize("name", ["complete", "chat"])
def test_usage_comes_with_streams_only_where_it_is_asked_for(served, name):
    ask = getattr(served, name)
    assert all("usage" not in chunk for chunk in ask(stream=True))
    options = {"include_usage": True}
    *chunks, last = ask(stream=True, stream_options=options)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == [] and last["usage"] == ask()["usage"]
    options = {"continuous_usage_stats": True}
    counts = [c["usage"]["completion_tokens"] for c in ask(stream=True, stream_options=options)]
    assert counts == sorted(counts) and counts[-1] == last["usage"]["completion_tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_choices_are_numbered_and_prompts_counted_once(served, stream):
    fields = {"n": 2, "stream": stream, "seed": 5}
    if stream:
        fields["stream_options"] = {"include_usage": True}
    served.runner.seen.clear()
    found = served.complete("Hi", **fields)
    chunks = found if stream else [found]
    assert {c["index"] for chunk in chunks for c in chunk["choices"]} == {0, 1}
    assert [(r.seed, r.stream) for r in served.runner.seen] == [(5, 0), (5, 1)]
    usage = chunks[-1]["usage"]
    assert usage["prompt_tokens"] == len(tokenizer().encode("Hi"))
    assert usage["completion_tokens"] == 2 * (len(tokenizer().encode(ANSWER, False)) + 1)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_several_prompts_are_answered_in_order(served):
    served.runner.seen.clear()
    found = served.complete([[5, 6], [7, 8, 9]], max_tokens=1)
    assert [choice["index"] for choice in found["choices"]] == [0, 1]
    assert sorted(tuple(r.prompt_ids) for r in served.runner.seen) == [(5, 6), (7, 8, 9)]
    assert found["usage"]["prompt_tokens"] == 5


@pytest.mark.parametrize("piece", [1, 3, 100])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_cut_text_tokens_and_logprobs(piece, stream):
    served = Served(runner={"piece": piece})
    found = served.complete(stop=[", how"], logprobs=0, stream=stream)
    assert text_of(found) == "Hello world"
    tokens = tokenizer().encode("Hello world, how", False)
    choices = [c for chunk in (found if stream else [found]) for c in chunk["choices"]]
    assert [t for c in choices for t in c["logprobs"]["tokens"]] == [
        *map(tokenizer().piece, tokens)
    ]
    assert max(o for c in choices for o in c["logprobs"]["text_offset"]) <= len("Hello world")
    assert choices[-1]["finish_reason"] == "stop"
    if not stream:
        assert found["usage"]["completion_tokens"] == len(tokens)
    assert served.runner.idle()


def test_chat_logprobs(served):
    found = served.chat(logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    tokens = [*tokenizer().encode(ANSWER, False), tokenizer().eos_token_id]
    assert [each["token"] for each in found] == [*map(tokenizer().piece, tokens)]
    assert all(each["logprob"] == -0.5 and len(each["top_logprobs"]) == 2 for each in found)
    assert bytes(found[0]["bytes"]).decode() == found[0]["token"]
    chunks = served.chat(logprobs=True, stream=True)
    streamed = [c["logprobs"] for chunk in chunks for c in chunk["choices"] if c["logprobs"]]
    assert [e["token"] for part in streamed for e in part["content"]] == [e["token"] for e in found]
    assert served.chat()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("prompt", ["Hello you é, world", [0, 43, 451, 131, 106, 813]])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_has_offsets_that_agree_with_the_text(prompt, stream):
    served = Served("the é and")
    found = served.complete(prompt, echo=True, logprobs=1, stream=stream)
    chunks = found if stream else [found]
    parts = [c["logprobs"] for chunk in chunks for c in chunk["choices"]]
    joined = {name: [x for part in parts for x in part[name]] for name in parts[0]}
    text = text_of(found)
    if isinstance(prompt, str):
        assert text == prompt + "the é and", "what was sent comes first, without what was added"
    assert joined["token_logprobs"][0] is None and joined["top_logprobs"][0] is None
    assert set(joined["token_logprobs"][1:]) == {-0.5}
    special = tokenizer().special_tokens.values()
    for token, place in zip(joined["tokens"], joined["text_offset"], strict=True):
        if "\ufffd" not in token and token not in special:
            assert text[place : place + len(token)] == token
    assert joined["text_offset"] == sorted(joined["text_offset"])


def test_of_tokens_that_read_the_same_the_most_likely_counts(served):
    lone = [t for t in range(1024) if tokenizer().piece(t) == "\ufffd"][:2]
    pieces_ = served.service.pieces
    scored = TokenLogprob(token=lone[1], logprob=-3.0, top=((lone[0], -0.1), (43, -2.0)))
    found = pieces_.completion([scored], [0], 2)
    assert found["top_logprobs"] == [{"H": -2.0, "\ufffd": -0.1}]
    assert pieces_.chat([scored])["content"][0]["bytes"] is None


def test_temperature_seed_and_ends_reach_the_runner(served):
    served.runner.seen.clear()
    fields = {"temperature": 0, "top_k": -1, "logit_bias": {"7": -100}, "speculation": "off"}
    served.chat(**fields, stop_token_ids=[9], seed=3, frequency_penalty=None, n=None)
    [request] = served.runner.seen
    assert request.sampling.temperature == 0 and request.sampling.top_k == 0
    assert request.sampling.logit_bias == {7: -100} and request.speculation == "off"
    assert request.stop_ids == (tokenizer().eos_token_id, 9) and request.seed == 3
    room = served.runner.limits.max_model_len - len(request.prompt_ids)
    assert request.max_tokens == room, "a chat may fill the context"
    served.runner.seen.clear()
    served.complete(ignore_eos=True, max_tokens=None)
    assert served.runner.seen[0].max_tokens == 16 and served.runner.seen[0].stop_ids == ()


@pytest.mark.parametrize("name", protocol.IGNORED)
def test_what_changes_no_text_is_ignored(served, name):
    assert text_of(served.complete(**{name: "x"})) == ANSWER


@pytest.mark.parametrize(("name", "neutral"), protocol.NEUTRAL.items())
def test_what_is_not_supported_is_refused_unless_it_asks_for_nothing(served, name, neutral):
    for value in neutral:
        assert text_of(served.complete(**{name: value})) == ANSWER
    error = served.refusal({"prompt": "Hi", name: [{"any": 1}]})
    assert error["param"] == name and error["code"] == "unsupported_parameter"


def test_deadlines_end_texts_and_say_so():
    served = Served(runner={"tick_s": 0.02}, request_timeout_s=0.05)
    [choice] = served.complete(ignore_eos=True)["choices"]
    assert choice["finish_reason"] == "length" and choice["stopped_by"] == "deadline"
    last = served.complete(ignore_eos=True, stream=True)[-1]["choices"][0]
    assert last["stopped_by"] == "deadline"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_clients_that_go_free_their_slots(path, stream, early):
    served = Served(runner={"tick_s": 0.02}, limits={"max_model_len": 4096})
    body = {"max_tokens": 4000, "ignore_eos": True, "stream": stream, "n": 2}
    body |= (
        {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in path else {"prompt": "Hi"}
    )

    async def go():
        after = asyncio.Event()
        if early:
            after.set()
        elif not stream:
            asyncio.get_running_loop().call_later(0.1, after.set)
        await served.leave(path, body, after)
        for _ in range(100):
            if not served.service.open:
                break
            await asyncio.sleep(0.01)

    asyncio.run(go())
    assert served.runner.idle(2), "slots stay in use"
    assert served.service.open == 0
    assert set(served.runner.ended.values()) == {"cancelled"}


def test_an_engine_that_fails_is_told_to_all():
    served = Served(runner={"tick_s": 0.05})

    async def go():
        body = {"prompt": "Hi", "max_tokens": 30, "ignore_eos": True}
        whole = asyncio.ensure_future(served.request("POST", "/v1/completions", json=body))
        stream = asyncio.ensure_future(
            served.request("POST", "/v1/completions", json={**body, "stream": True})
        )
        await asyncio.sleep(0.1)
        await asyncio.to_thread(served.runner.fail, RuntimeError("out of luck"))
        return await whole, await stream

    whole, stream = asyncio.run(go())
    assert whole.status_code == 500 and "out of luck" in whole.json()["error"]["message"]
    assert "out of luck" in stream.text and "[DONE]" not in stream.text
    assert served.get("/health").status_code == 503 and served.get("/ready").status_code == 503
    served.refusal({"prompt": "Hi"}, status=503)


def test_draining_finishes_what_runs_and_takes_nothing():
    served = Served(runner={"tick_s": 0.02})

    async def go():
        body = {"prompt": "Hi", "max_tokens": 8, "ignore_eos": True, "stream": True}
        running = asyncio.ensure_future(served.request("POST", "/v1/completions", json=body))
        await asyncio.sleep(0.05)
        served.service.ending.set()
        served.runner.drain(0.0)
        refused = await served.request("POST", "/v1/completions", json=body)
        ready, health = [await served.request("GET", p) for p in ("/ready", "/health")]
        return await running, refused, ready, health

    running, refused, ready, health = asyncio.run(go())
    assert refused.status_code == 503 and refused.headers["retry-after"]
    assert ready.status_code == 503 and health.status_code == 200
    assert sum(len(c["choices"][0]["token_ids"]) for c in pieces(running.text)) == 8
