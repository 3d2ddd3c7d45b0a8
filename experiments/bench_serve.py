"""What does serving cost against offline decoding, and what do requests do to each other?

    python -m experiments.bench_serve --model=smollm2-135m --drafter=ngram --output=serve.jsonl

Greedy requests with random prompts go to a server, in this process (transport "asgi") and over a socket. --measures:

* throughput: output tokens/s at as many requests as slots, beside `generate` with that batch size;
* idle: one request alone: time to first token and per token, beside `generate`;
* arrival: all slots but one stream while a long prompt arrives: longest gap, rate beside that without it;
* repeat: the same long prompt twice: time to first token of both;
* capacity: time per token of one stream with slots of --max_model_len and with slots an eighth as long.

--output receives a row for each, with "record": "serve"; rows are appended.
"""

import asyncio
import sys
import time
from typing import Any

import numpy as np
from absl import flags

from experiments import serve
from experiments.shared import (
    common,
    environment,
    flag_groups,
    flags_model,
    naming,
    records,
    serve_clients,
)
from experiments.shared.serve_clients import Ask
from specjax.errors import ConfigError
from specjax.serving.http import app, process
from specjax.serving.http.settings import Settings
from specjax.serving.runner import EngineRunner

MEASURES = ("throughput", "idle", "arrival", "repeat", "capacity")
TRANSPORTS = ("asgi", "socket")
# The server and `generate` are given the same prompts: how many drafts are accepted depends on them.
_SEED_TOGETHER, _SEED_ALONE = 1, 2


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary: those of the server, and what is measured."""
    serve.define_flags(values)
    integer = lambda *a: flags.DEFINE_integer(*a, flag_values=values, lower_bound=1)
    with flag_groups.heading(values, "Measuring"):
        flags.DEFINE_multi_enum(
            "measures", list(MEASURES), MEASURES, "What to measure.", flag_values=values
        )
        integer("prompt_tokens", 64, "Tokens of a prompt.")
        integer("long_prompt_tokens", 1000, "Tokens of the long prompts.")
        integer("max_new_tokens", 128, "Tokens of an answer.")
    with flag_groups.heading(values, "Output"):
        flags.DEFINE_string("output", None, "JSON lines; rows are appended.", flag_values=values)
    flags.mark_flag_as_required("output", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Measures, writes, prints."""
    output = records.check_output(values.output, ".jsonl")
    spec = serve.drafter_spec(values)
    longest = max(values.prompt_tokens, values.long_prompt_tokens) + values.max_new_tokens
    model = flags_model.load_model(values, [spec])
    capacity = serve.capacity(values, model)
    if longest > capacity:
        raise ConfigError(
            f"--long_prompt_tokens and --max_new_tokens need {longest} positions, slots have {capacity}: raise "
            "--max_model_len or lower them"
        )
    config = {
        **flags_model.model_config(values),
        **{name: values[name].value for name in ("max_num_seqs", "prompt_tokens")},
        **{name: values[name].value for name in ("long_prompt_tokens", "max_new_tokens")},
        "max_model_len": capacity,
        "drafter": naming.full_spec(spec),
        "environment": environment.record(),
    }
    for row in _rows(values, model, spec, capacity):
        records.append_rows(output, [{"record": "serve", **row, "config": config}])
        print(
            "  ".join(
                f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()
            )
        )
    print(f"-> {output}")


def _rows(values, model, spec, capacity: int):
    """The rows, as they are measured."""
    sizes = {name: values[name].value for name in ("prompt_tokens", "max_new_tokens")}
    vocabulary = model.config.vocab_size
    names = [name for name in values.measures if name != "capacity"]
    offline = _offline(values, model, spec, names)
    with _Server(values, model, capacity) as served:
        for transport in TRANSPORTS if names else ():
            with served.ask(transport) as ask:
                load = Load(
                    ask, vocabulary, values.max_num_seqs, values.long_prompt_tokens, **sizes
                )
                asyncio.run(load.warm_up())
                for name in names:
                    found = asyncio.run(getattr(load, name)())
                    yield {
                        "measure": name,
                        "transport": transport,
                        **found,
                        **offline.get(name, {}),
                    }
        if "capacity" in values.measures:
            yield {
                "measure": "capacity",
                "max_model_len": capacity,
                **_alone(served, vocabulary, sizes),
            }
    if "capacity" in values.measures:
        short = max(capacity // 8, sum(sizes.values()))
        with _Server(values, model, short) as served:
            yield {
                "measure": "capacity",
                "max_model_len": short,
                **_alone(served, vocabulary, sizes),
            }


def _alone(served: "_Server", vocabulary: int, sizes: dict[str, int]) -> dict[str, float]:
    with served.ask("asgi") as ask:
        return asyncio.run(Load(ask, vocabulary, 1, 1, **sizes).idle())


def _offline(values, model, spec, names) -> dict[str, dict[str, float]]:
    """What `generate` does with the same prompts, compiled before it is timed."""

    def run(count: int, seed: int) -> float:
        drawn = _prompts(model.config.vocab_size, values.prompt_tokens, count, seed)
        prompts = [{"input_ids": ids} for ids in drawn]
        options = dict(max_new_tokens=values.max_new_tokens, batch_size=count, ignore_eos=True)
        model.generate(prompts, spec, **options)  # compiles
        begin = time.perf_counter()
        model.generate(prompts, spec, **options)
        return time.perf_counter() - begin

    found = {}
    if "throughput" in names:
        count = values.max_num_seqs
        found["throughput"] = {
            "offline_tokens_per_s": count * values.max_new_tokens / run(count, _SEED_TOGETHER)
        }
    if "idle" in names:
        found["idle"] = {"offline_per_token_ms": 1e3 * run(1, _SEED_ALONE) / values.max_new_tokens}
    return found


class _Server:
    """The slots of a model behind the HTTP application, warmed up."""

    def __init__(self, values, model, capacity: int):
        engine = serve.engine(values, model, serve.drafter_spec(values), capacity)
        self._runner = EngineRunner(engine, vocab_size=model.config.vocab_size)
        settings = Settings(model_name=values.model, max_queue=values.max_queue)
        self._app = app.create(process.service(model, self._runner, settings))

    def __enter__(self) -> "_Server":
        print("compiling", file=sys.stderr)
        self._runner.start()
        self._runner.wait_ready()
        return self

    def __exit__(self, *_) -> None:
        self._runner.close()

    def ask(self, transport: str):
        """A context with what asks it."""
        return serve_clients.connected(self._app, transport)


class Load:
    """Requests of one kind, and what is seen of them; each method gives the figures of a row.

    Args:
        ask: a client.
        vocab_size: random tokens of prompts are below it.
        num_streams: requests that run together.
        long_prompt_tokens: of the prompts of `arrival` and `repeat`.
        prompt_tokens, max_new_tokens: of the others, and of all answers.
    """

    def __init__(
        self,
        ask: Ask,
        vocab_size: int,
        num_streams: int,
        long_prompt_tokens: int,
        *,
        prompt_tokens: int,
        max_new_tokens: int,
    ):
        self._ask, self._vocabulary, self._streams = ask, vocab_size, num_streams
        self._long, self._short, self._new = long_prompt_tokens, prompt_tokens, max_new_tokens

    async def warm_up(self) -> None:
        """What only a first request pays is paid; its prompt is no other's."""
        await self._one(self._prompts(1, 6)[0])

    async def throughput(self) -> dict[str, Any]:
        """All slots at once."""
        begin = time.perf_counter()
        found = await asyncio.gather(
            *(self._one(p) for p in self._prompts(self._streams, _SEED_TOGETHER))
        )
        seconds = time.perf_counter() - begin
        return {"tokens_per_s": sum(each.tokens for each in found) / seconds}

    async def idle(self) -> dict[str, Any]:
        """One request alone."""
        found = await self._one(self._prompts(1, _SEED_ALONE)[0])
        return {"ttft_ms": 1e3 * found.ttft_s, "per_token_ms": 1e3 * found.per_token_s}

    async def arrival(self) -> dict[str, Any]:
        """Streams while a long prompt arrives, beside the same without it."""
        count = max(self._streams - 1, 1)
        before = await asyncio.gather(*(self._one(p) for p in self._prompts(count, 3)))
        streams = [asyncio.ensure_future(self._one(p)) for p in self._prompts(count, 4)]
        await asyncio.sleep(before[0].ttft_s)
        [long] = _prompts(self._vocabulary, self._long, 1, seed=5)
        arrived = await self._one(long)
        during = await asyncio.gather(*streams)
        slowest = max(each.per_token_s for each in during)
        return {
            "longest_gap_ms": 1e3 * max(each.longest_gap_s for each in during),
            "longest_gap_without_ms": 1e3 * max(each.longest_gap_s for each in before),
            "rate_kept": max(each.per_token_s for each in before) / slowest if slowest else 1.0,
            "ttft_ms": 1e3 * arrived.ttft_s,
        }

    async def repeat(self) -> dict[str, Any]:
        """The same long prompt twice."""
        [prompt] = _prompts(self._vocabulary, self._long, 1, seed=time.time_ns())
        first, second = await self._one(prompt), await self._one(prompt)
        return {"first_ttft_ms": 1e3 * first.ttft_s, "second_ttft_ms": 1e3 * second.ttft_s}

    def _prompts(self, count: int, seed: int) -> list[list[int]]:
        return _prompts(self._vocabulary, self._short, count, seed)

    async def _one(self, prompt: list[int]) -> serve_clients.Timeline:
        fields = {"max_tokens": self._new, "temperature": 0, "ignore_eos": True, "stream": True}
        return await self._ask({"prompt": prompt, **fields})


def _prompts(vocab_size: int, size: int, count: int, seed: int) -> list[list[int]]:
    return np.random.default_rng(seed).integers(0, vocab_size, (count, size)).tolist()


if __name__ == "__main__":
    sys.argv[1:] = serve.with_underscores(sys.argv[1:])
    common.run(define_flags, main)
