"""The bench of the server: its clients and measures over scripted tokens; all of it on a tiny model."""

import asyncio

import pytest

from experiments import bench_serve
from experiments.shared import serve_clients
from tests.experiments import benchmark_data
from tests.serving.http_client import Served

SIZES = dict(prompt_tokens=4, max_new_tokens=6)


@pytest.mark.parametrize("transport", bench_serve.TRANSPORTS)
def test_measures_see_every_token(transport):
    served = Served([43, 82], runner={"tick_s": 0.01, "piece": 2})
    with serve_clients.connected(served.app, transport) as ask:
        body = {"prompt": [5], "max_tokens": 7, "ignore_eos": True, "stream": True}
        found = asyncio.run(ask(body))
        assert found.tokens == 7 and 0 < found.ttft_s < 5
        assert found.longest_gap_s >= 0.01 and 0 < found.per_token_s < 1
        with pytest.raises(RuntimeError, match="the server refused"):
            asyncio.run(ask({**body, "n": 99}))
        load = bench_serve.Load(ask, 1024, 3, 20, **SIZES)
        assert asyncio.run(load.throughput())["tokens_per_s"] <= 3 * 2 / 0.01
        assert asyncio.run(load.idle())["per_token_ms"] > 1
        served.runner.seen.clear()
        assert set(asyncio.run(load.arrival())) == {
            *("longest_gap_ms", "longest_gap_without_ms", "rate_kept", "ttft_ms")
        }
        lengths = sorted(len(request.prompt_ids) for request in served.runner.seen)
        assert lengths == [4, 4, 4, 4, 20]
        served.runner.seen.clear()
        asyncio.run(load.repeat())
        first, second = served.runner.seen
        assert first.prompt_ids == second.prompt_ids and len(first.prompt_ids) == 20
    assert served.runner.idle()


def test_prompts_that_do_not_fit_are_refused_before_anything_is_compiled(run, tiny, tmp_path):
    output = tmp_path / "rows.jsonl"
    arguments = [f"--model={tiny}", f"--output={output}", "--max_model_len=64"]
    code, _, errors = run(bench_serve, *arguments, "--long_prompt_tokens=60")
    assert code and "slots have 64" in errors and not output.exists()


@pytest.mark.slow
def test_all_rows_of_a_tiny_model(run, tiny, tmp_path):
    output = tmp_path / "rows.jsonl"
    sizes = ["--prompt_tokens=8", "--long_prompt_tokens=40", "--max_new_tokens=8"]
    arguments = [f"--model={tiny}", f"--output={output}", "--max_model_len=160", *sizes]
    code, printed, errors = run(bench_serve, *arguments, "--max_num_seqs=2", "--drafter=ngram")
    assert code == 0, errors
    rows = benchmark_data.read(output)
    found = [(row["measure"], row.get("transport")) for row in rows]
    loads = [(m, t) for t in bench_serve.TRANSPORTS for m in bench_serve.MEASURES[:-1]]
    assert found == [*loads, ("capacity", None), ("capacity", None)]
    assert [row["max_model_len"] for row in rows[-2:]] == [160, 20]
    assert all(row["record"] == "serve" and row["config"]["environment"]["jax"] for row in rows)
    assert rows[0]["offline_tokens_per_s"] > 0 and "offline_tokens_per_s" in printed
