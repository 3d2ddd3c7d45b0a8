"""The serving process as users run it: clients of other makes, clients that are killed, SIGTERM."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

import specjax
from tests import paths
from tests.serving.http_client import TEMPLATE

KILLED = """
import sys, openai
client = openai.OpenAI(api_key="x", base_url=sys.argv[1], max_retries=0)
for chunk in client.completions.create(model="tiny", prompt="Hello", max_tokens=900, stream=True):
    print("piece", flush=True)
"""
pytestmark = pytest.mark.slow  # a process that compiles, about half a minute


class Process:
    """`python -m experiments.serve` over the tiny fixture with n-gram drafts.

    Attributes:
        url: where it serves, once it does.
    """

    def __init__(self, folder, *flags: str):
        template = folder / "template.jinja"
        template.write_text(TEMPLATE, encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "experiments.serve",
            f"--model={paths.fixture('tiny-fp16')}",
        ]
        command += ["--drafter=ngram", "--port=0", "--served-model-name=tiny", *flags]
        command += [f"--chat_template={template}", "--max-model-len=1024", "--max-num-seqs=4"]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        self._log = open(folder / "log", "w+", encoding="utf-8")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, cwd=paths.REPOSITORY, env=environment, stderr=self._log
        )
        self.url = self._wait()

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def _wait(self) -> str:
        for _ in range(1200):
            assert self.process.poll() is None, self.log()
            if found := re.search(r"at (http://\S+)", self.log()):
                return found[1]
            time.sleep(0.1)
        raise AssertionError(self.log())

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(api_key="x", base_url=f"{self.url}/v1", max_retries=5)

    def running(self) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        return float(re.search(r"^vllm:num_requests_running\{.*\} (.*)$", text, re.M)[1])

    def wait_idle(self) -> None:
        for _ in range(100):
            if self.running() == 0:
                return
            time.sleep(0.1)
        raise AssertionError("slots stay in use")

    def end(self) -> int:
        """The exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            self._log.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    process = Process(tmp_path_factory.mktemp("served"))
    yield process
    if process.process.poll() is None:
        process.end()


def test_answers_are_those_of_generate(served):
    model = specjax.load(paths.fixture("tiny-fp16"), dtype="float32", chat_template=TEMPLATE)
    turns = [{"role": "user", "content": "Hello"}]
    text, chat = model.generate([{"text": "Hello world"}, {"messages": turns}], max_new_tokens=24)
    client = served.client()
    greedy = dict(model="tiny", max_tokens=24, temperature=0)
    completion = client.completions.create(prompt="Hello world", **greedy)
    assert completion.choices[0].text == text.text
    assert completion.usage.completion_tokens == len(text.output_ids)
    answer = client.chat.completions.create(messages=turns, **greedy)
    assert answer.choices[0].message.content == chat.text
    stream = client.chat.completions.create(messages=turns, stream=True, **greedy)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == chat.text


def test_killed_clients_free_their_slots(served):
    command = [sys.executable, "-c", KILLED, f"{served.url}/v1"]
    clients = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(4)]
    try:
        for client in clients:
            assert client.stdout.readline() == b"piece\n"
    finally:
        for client in clients:
            client.kill()
            client.wait()
            client.stdout.close()
    served.wait_idle()
    text = httpx.get(f"{served.url}/metrics").text
    assert 'vllm:request_success_total{finished_reason="cancelled",model_name="tiny"}' in text
    assert served.client().completions.create(model="tiny", prompt="Hello", max_tokens=2)


def test_sigterm_lets_streams_finish(served):
    counts, begun = [], threading.Barrier(9)

    def read() -> None:
        fields = dict(model="tiny", prompt="Hello", max_tokens=200, stream=True)
        stream = served.client().completions.create(**fields, extra_body={"ignore_eos": True})
        begun.wait(60)
        tokens, reason = 0, None
        for chunk in stream:
            tokens += len(chunk.choices[0].token_ids)
            reason = chunk.choices[0].finish_reason
        counts.append((tokens, reason))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    begun.wait(60)
    assert served.end() == 0
    for thread in threads:
        thread.join(60)
    assert counts == [(200, "length")] * 8
