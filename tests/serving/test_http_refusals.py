"""What the server refuses and how, keys, limits; its other endpoints; nothing of a prompt in logs."""

import asyncio
import json
import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specjax.errors import ConfigError
from specjax.serving.http import process, protocol
from tests.serving.http_client import Served, text_of, tokenizer

USER = [{"role": "user", "content": "Hi"}]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def served():
    return Served()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 1e999}, None),
        ({"top_p": 0}, "top_p"),
        ({"top_p": "0.5"}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 4}, "n"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 3 + [1]}, "stop"),
        ({"stop": [str(i) for i in range(17)]}, "stop"),
        ({"stop": "\ud800"}, "stop"),
        ({"logprobs": 6}, None),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"1024": 1}}, None),
        ({"stop_token_ids": [5000]}, None),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
        ({"stream": "yes"}, "stream"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": [5000]}, "prompt"),
        ({"prompt": [[1], [-1]]}, "prompt"),
        ({"prompt": [[]]}, None),
        ({"prompt": [10**40]}, "prompt"),
        ({"max_token": 5}, "max_token"),
        ({"\ud800": 5}, "\\ud800"),
        ({"messages": USER}, "messages"),
    ],
)
def test_wrong_fields_are_named(served, fields, param):
    body = json.dumps({"prompt": "Hi", **fields})
    response = served.post(COMPLETIONS, content=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and error["param"] == param
    if param is not None:
        assert param in error["message"]
    assert served.runner.idle()


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": 1, "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"top_logprobs": 2},
        {"logprobs": 2},
        {"continue_final_message": True, "add_generation_prompt": True},
    ],
)
def test_wrong_chats_are_refused(served, fields):
    served.refusal({"messages": USER, **fields}, CHAT)


def test_an_unknown_field_is_refused_by_name(served):
    error = served.refusal({"prompt": "Hi", "best": 1})
    assert error["code"] == "unknown_parameter" and "best" in error["message"]
    assert "max_tokens" in error["message"], "what there is"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe{", b"[" * 5000, b'{"prompt": NaN}']
)
def test_what_is_no_json_object_is_refused(served, body):
    for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize"):
        assert served.post(path, content=body).status_code == 400


def test_context_length(served):
    error = served.refusal({"prompt": [5] * 64})
    assert error["code"] == "context_length_exceeded" and "64" in error["message"]
    error = served.refusal({"prompt": [5] * 60, "max_tokens": 5})
    assert error["code"] == "context_length_exceeded"
    assert served.complete([5] * 60, max_tokens=4)["usage"]["prompt_tokens"] == 60


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
_NAMES = sorted({*protocol.Chat.model_fields, *protocol.Completion.model_fields, *protocol.NEUTRAL})


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from([COMPLETIONS, CHAT, "/tokenize", "/detokenize"]),
    base=st.sampled_from([{}, {"prompt": "Hi"}, {"messages": USER}, {"tokens": [1]}]),
    fields=st.dictionaries(st.sampled_from(_NAMES) | st.text(max_size=3), _VALUES, max_size=3),
    whole=st.none() | _VALUES,
)
def test_no_json_makes_the_server_fail(served, path, base, fields, whole):
    body = whole if whole is not None else base | fields
    response = served.post(path, content=json.dumps(body))
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]


def test_paths_and_methods(served):
    assert served.get("/v1/nothing").status_code == 404
    assert served.post("/v1/nothing", {}).status_code == 404
    for path in (COMPLETIONS, CHAT, "/tokenize"):
        response = served.get(path)
        assert response.status_code == 405 and response.json()["error"]["message"]
    assert served.post("/health", {}).status_code == 405
    assert served.get("/v1/models/other").status_code == 404
    assert served.get("/v1/models/tiny").json()["max_model_len"] == 64
    assert served.get("/version").json()["version"]
    assert served.get("/health").status_code == served.get("/ready").status_code == 200


def test_aliases_are_served():
    served = Served(aliases=("org/other",))
    assert served.complete(model="org/other")["model"] == "tiny"
    assert served.get("/v1/models/org/other").json()["id"] == "org/other"
    assert served.refusal({"prompt": "Hi", "model": "x"}, status=404)["code"] == "model_not_found"


def test_keys_let_in_and_keep_prefixes_apart():
    served = Served(api_keys=("one", "two"), isolate_keys=True)
    ask = lambda headers: served.post(COMPLETIONS, {"prompt": "Hi"}, headers=headers)
    for headers in ({}, {"Authorization": "Bearer three"}, {"Authorization": "Bearer \u00fc"}):
        raw = {name: value.encode("latin-1") for name, value in headers.items()}
        response = ask(raw)
        assert response.status_code == 401 and "www-authenticate" in response.headers
    for path in ("/v1/models", "/v1/models/tiny"):
        assert served.get(path).status_code == 401
    assert served.post("/tokenize", {"prompt": "Hi"}).status_code == 401
    assert served.get("/health").status_code == 200
    for key in ("one", "two", "one"):
        assert ask({"Authorization": f"Bearer {key}"}).status_code == 200
    first, second, third = (request.namespace for request in served.runner.seen)
    assert first == third != second and "one" not in first
    shared = Served(api_keys=("one", "two"))
    for key in ("one", "two"):
        shared.post(COMPLETIONS, {"prompt": "Hi"}, headers={"Authorization": f"Bearer {key}"})
    assert {request.namespace for request in shared.runner.seen} == {""}


def test_bodies_have_a_limit_whatever_their_header_says():
    served = Served(max_body_bytes=200)
    assert served.refusal({"prompt": "x" * 300}, status=413)["code"] == "body_too_large"

    async def chunks():
        for _ in range(5):
            yield b" " * 50

    assert served.post(COMPLETIONS, content=chunks()).status_code == 413


def test_more_than_may_wait_are_told_to_come_back():
    served = Served(runner={"tick_s": 0.02}, max_queue=2, limits={"num_slots": 1})

    async def go():
        body = {"prompt": "Hi", "max_tokens": 5, "ignore_eos": True}
        asks = [served.request("POST", COMPLETIONS, json=body) for _ in range(6)]
        return await asyncio.gather(*asks)

    found = asyncio.run(go())
    assert sorted(r.status_code for r in found) == [200] * 3 + [429] * 3
    busy = next(r for r in found if r.status_code == 429)
    assert busy.headers["retry-after"] and busy.json()["error"]["type"] == "rate_limit_error"
    assert served.complete() and served.service.open == 0
    served.refusal({"prompt": [[5]] * 4})


def test_tokens_and_back(served):
    found = served.post("/tokenize", {"prompt": "Hello world", "return_token_strs": True}).json()
    assert found["tokens"] == tokenizer().encode("Hello world")
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 64
    back = served.post("/detokenize", {"tokens": found["tokens"]}).json()
    assert back == {"prompt": "Hello world"}
    chat = served.post("/tokenize", {"messages": USER}).json()
    assert chat["tokens"] == tokenizer().apply_chat_template(USER)
    for body in ({}, {"prompt": "x", "messages": USER}, {"prompt": "\ud800"}):
        assert served.post("/tokenize", content=json.dumps(body)).status_code == 400
    for tokens in ([1024], [-1], ["x"], None):
        served.refusal({"tokens": tokens}, "/detokenize")


def test_metrics_have_the_names_of_vllm(served):
    served.complete()
    text = served.get("/metrics").text
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    counters = (
        *("prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits"),
        *("spec_decode_num_drafts", "spec_decode_num_draft_tokens"),
        "spec_decode_num_accepted_tokens",
    )
    histograms = (
        *("time_to_first_token_seconds", "e2e_request_latency_seconds"),
        *("request_queue_time_seconds", "request_prefill_time_seconds"),
        *("request_decode_time_seconds", "request_time_per_output_token_seconds"),
        *("inter_token_latency_seconds", "request_prompt_tokens", "request_generation_tokens"),
    )
    for name in (*gauges, *(f"{c}_total" for c in counters), *(f"{h}_count" for h in histograms)):
        assert f'\nvllm:{name}{{model_name="tiny"}} ' in text, name
    assert 'vllm:request_success_total{finished_reason="stop",model_name="tiny"}' in text
    place = 'vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="tiny",position="0"}'
    assert place in text


def test_the_page_comes_with_its_policy(served):
    for path, kind in (("/", "text/html"), ("/app.js", "javascript"), ("/style.css", "text/css")):
        response = served.get(path)
        assert response.status_code == 200 and kind in response.headers["content-type"]
        assert "default-src 'self'" in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"
    page = served.get("/").text
    assert "<script>" not in page and "http://" not in page and "style=" not in page


def test_logs_and_failures_say_nothing_of_prompts(served, caplog, monkeypatch):
    secret = "Grandmother"
    caplog.set_level(logging.DEBUG)
    text_of(served.complete(secret))
    served.refusal({"prompt": secret, "n": 9})

    def fail(self, *arguments):
        raise ValueError(f"cannot read {secret}")

    monkeypatch.setattr(type(served.service.prompts), "completion", fail)
    error = served.refusal({"prompt": secret}, status=500)
    assert secret not in error["message"] and error["type"] == "internal_server_error"
    monkeypatch.undo()
    monkeypatch.setattr("specjax.serving.http.formats.extras", fail)
    response = served.post(COMPLETIONS, {"prompt": secret, "stream": True})
    assert "the server failed" in response.text and "[DONE]" not in response.text
    assert served.runner.idle()
    assert "failed" in caplog.text and secret not in caplog.text


def test_a_taken_port_is_refused_before_anything_is_loaded():
    first = process.bind("127.0.0.1", 0)
    first.listen()
    try:
        with pytest.raises(ConfigError, match=r"port=\d+: cannot listen there"):
            process.bind("127.0.0.1", first.getsockname()[1])
    finally:
        first.close()
    with pytest.raises(ConfigError, match="host='no such host'"):
        process.bind("no such host", 1)
