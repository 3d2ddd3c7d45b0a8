import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest

import specjax
from experiments import evaluate, rescore
from experiments.shared import answering, common
from specjax.engine import trace
from tests import paths
from tests import tiny as models
from tests.experiments import benchmark_data

_TIMES = ("prefill_ms", "decode_ms", "compile_ms", "tokens_per_s")


@pytest.fixture(autouse=True, scope="module")
def hurry():
    """What is tested here is the bookkeeping."""
    with models.hurried_compiler():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "chat.jinja").write_text(benchmark_data.CHAT_TEMPLATE)
    return benchmark_data.write(folder)


@pytest.fixture
def arguments(data, tiny, tmp_path):
    """arguments(benchmark, *more) -> arguments of the binary; answers go to tmp_path / "out"."""

    def make(benchmark: str, *more: str) -> list[str]:
        return [
            f"--benchmark={benchmark}",
            f"--data_dir={data}",
            f"--model={tiny}",
            f"--chat_template={data / 'chat.jinja'}",
            f"--output={tmp_path / 'out'}",
            "--max_new_tokens=6",
            "--dtype=float32",
            "--run_name=run",
            *more,
        ]

    return make


def _without_times(rows: list[dict]) -> list[dict]:
    """Rows less timing, time stamps and answer ids."""
    rows = json.loads(json.dumps(rows))
    for row in rows:
        for name in ("tstamp", "answer_id"):
            del row[name]
        for name in ("wall_time", "generate_speed"):
            del row["choices"][0][name]
        for metrics in row["metrics"]:
            for name in _TIMES:
                del metrics[name]
        del row["config"]["environment"]
    return rows


def test_rows_have_the_fields_of_the_reference(run, arguments, tmp_path):
    code, printed, errors = run(
        evaluate, *arguments("mt_bench", "--drafter=ngram", "--limit_per_category=1")
    )
    assert code == 0, errors
    rows = benchmark_data.read(tmp_path / "out" / "mt_bench" / "run.jsonl")
    assert [row["question_id"] for row in rows] == [81, 82, 83]
    assert [row["category"] for row in rows] == ["writing", "math", "qa"]
    assert len({row["answer_id"] for row in rows}) == 3
    for row, turns in zip(rows, (2, 2, 1), strict=True):
        assert row["model_id"] == "run" and row["error"] is None and row["tstamp"] > 0
        [choice] = row["choices"]
        for name in ("turns", "decoding_steps", "new_tokens", "wall_time", "generate_speed"):
            assert len(choice[name]) == turns, name
        assert sum(choice["decoding_steps"]) == len(choice["accept_lengths"])
        # Every turn's first token is prefill's; its last step may have found more than there was room for.
        assert sum(choice["accept_lengths"]) + turns >= sum(choice["new_tokens"])
        for tokens, seconds, speed in zip(
            choice["new_tokens"], choice["wall_time"], choice["generate_speed"], strict=True
        ):
            assert speed == pytest.approx(tokens / seconds)
        assert row["prompt_tokens"][-1] > row["prompt_tokens"][0] or turns == 1
        assert row["config"]["weights"] == "dense"
        assert row["config"]["drafter"]["kind"] == "ngram"
        assert row["config"]["environment"]["jax"]
    assert "3 questions" in printed and "acceptance length" in printed


@pytest.mark.slow
def test_drafters_and_batches_answer_alike(run, arguments, tmp_path):
    found = {}
    for name, more in (
        ("plain", ["--drafter=none"]),
        ("batch", ["--drafter=ngram", "--batch_size=2"]),
    ):
        flags = arguments("human_eval", *more, f"--run_name={name}")
        assert run(evaluate, *flags)[0] == 0
        rows = benchmark_data.read(tmp_path / "out" / "human_eval" / f"{name}.jsonl")
        found[name] = [row["output_ids"] for row in rows]
        assert {row["metrics"][0]["batch_size"] for row in rows} == {2 if name == "batch" else 1}
    assert found["plain"] == found["batch"]


def test_traced_steps_keep_their_order(run, arguments, tmp_path):
    def step(*accepted):
        return trace.Step(drafted=accepted, parents=(), accepted=accepted, token=1, kind="bonus")

    counts = {"num_spec_steps": 3, "num_draft_tokens": 9, "batch_size": 1, "new_tokens": 6}
    times = {"prefill_ms": 1.0, "decode_ms": 1.0, "compile_ms": 0.0}
    metrics = specjax.Metrics(acceptance_histogram=(1, 1, 1), **counts, **times)
    assert answering._accept_lengths(metrics) == [1, 2, 3]
    traced = dataclasses.replace(metrics, trace=(step(5), step(6, 7), step()))
    assert answering._accept_lengths(traced) == [2, 3, 1]
    flags = ("--drafter=self", "--draft_depth=2", "--limit=1", "--max_new_tokens=8", "--trace")
    assert run(evaluate, *arguments("human_eval", *flags))[0] == 0
    [row] = benchmark_data.read(tmp_path / "out" / "human_eval" / "run.jsonl")
    assert row["choices"][0]["accept_lengths"] == [3, 3, 3]
    assert "trace" not in row["metrics"][0]


def test_the_drafters_share_of_the_prompts_time(run, arguments, tmp_path):
    flags = ("--drafter=self", "--limit=1", "--draft_prefill_sep")
    assert run(evaluate, *arguments("human_eval", *flags))[0] == 0
    [row] = benchmark_data.read(tmp_path / "out" / "human_eval" / "run.jsonl")
    [latency] = row["choices"][0]["draft_prefill_latency"]
    assert latency < row["metrics"][0]["prefill_ms"] / 1e3
    assert run(evaluate, *arguments("human_eval", "--run_name=none", "--limit=1", flags[2]))[0] == 0
    [row] = benchmark_data.read(tmp_path / "out" / "human_eval" / "none.jsonl")
    assert "draft_prefill_latency" not in row["choices"][0]


def test_gsm8k_always_decodes_the_whole_limit_and_is_scored(run, arguments, tmp_path):
    # The eight examples are long in the tiny tokenizer, so the question is what matters here.
    code, printed, errors = run(evaluate, *arguments("gsm8k", "--limit=2"))
    assert code == 0, errors
    rows = benchmark_data.read(tmp_path / "out" / "gsm8k" / "run.jsonl")
    assert [row["question_id"] for row in rows] == [0, 1]
    for row in rows:
        assert row["choices"][0]["new_tokens"] == [6]
        assert row["gold"] == str(1000 + row["id"]) and row["correct"] in (True, False)
        assert row["config"]["ignore_eos"] is True
    assert "of 2 correct" in printed


def test_a_prompt_without_room_is_reported(run, arguments, tmp_path):
    code, printed, errors = run(evaluate, *arguments("gsm8k", "--limit=1", "--max_length=8"))
    assert code == 0, errors
    [row] = benchmark_data.read(tmp_path / "out" / "gsm8k" / "run.jsonl")
    assert "max_length is 8" in row["error"] and row["choices"][0]["turns"] == []
    assert "correct" not in row
    assert "1 without a timed answer" in printed


@pytest.mark.slow  # a killed one is tested fast
def test_an_interrupted_run_ends_as_a_whole_one(run, arguments, tmp_path):
    sampled = ("--drafter=ngram", "--temperature=1", "--seed=4", "--limit=4")
    whole = tmp_path / "out" / "mt_bench" / "whole.jsonl"
    broken = tmp_path / "out" / "mt_bench" / "broken.jsonl"
    assert run(evaluate, *arguments("mt_bench", *sampled, "--run_name=whole"))[0] == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    text = b"".join([*lines[:2], lines[2][:200]]).replace(b'"whole"', b'"broken"')
    broken.write_bytes(text)
    assert run(evaluate, *arguments("mt_bench", *sampled, "--run_name=broken"))[0] == 0
    assert broken.read_bytes().startswith(text[: text.rindex(b"\n")])
    expected, found = (_without_times(benchmark_data.read(path)) for path in (whole, broken))
    for row in expected:
        row["model_id"] = row["config"]["run_name"] = "broken"
    assert found == expected
    before = broken.read_bytes()
    code, printed, _ = run(evaluate, *arguments("mt_bench", *sampled, "--run_name=broken"))
    assert code == 0 and "4 questions" in printed
    assert broken.read_bytes() == before


def test_a_larger_limit_continues_a_smaller_one(run, arguments, tmp_path):
    path = tmp_path / "out" / "mt_bench" / "run.jsonl"
    for limit, ids in ((2, [81, 82]), (4, [81, 82, 83, 84])):
        assert run(evaluate, *arguments("mt_bench", f"--limit={limit}"))[0] == 0
        assert [row["id"] for row in benchmark_data.read(path)] == ids


def test_a_killed_run_ends_as_a_whole_one(run, data, tiny, tmp_path):
    many = benchmark_data.write(tmp_path / "data", questions=60, turns=1)
    flags = [
        "--benchmark=mt_bench",
        f"--data_dir={many}",
        f"--model={tiny}",
        f"--chat_template={data / 'chat.jinja'}",
        *("--max_new_tokens=24", "--drafter=ngram", "--run_name=run", "--dtype=float32"),
    ]
    command = [sys.executable, "-m", "experiments.evaluate", *flags]
    command += [f"--output={tmp_path / 'killed'}", f"--compile_cache_dir={tmp_path / 'cache'}"]
    settings = {
        "cwd": paths.REPOSITORY,
        "env": {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
    }
    killed = tmp_path / "killed" / "mt_bench" / "run.jsonl"
    process = subprocess.Popen(command, **settings)
    deadline = time.monotonic() + 400
    while not (killed.exists() and killed.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 3 <= killed.read_bytes().count(b"\n") < 60
    subprocess.run(command, check=True, **settings)
    code, _, errors = run(evaluate, *flags, f"--output={tmp_path / 'whole'}")
    assert code == 0, errors
    whole = tmp_path / "whole" / "mt_bench" / "run.jsonl"
    found, expected = (_without_times(benchmark_data.read(path)) for path in (killed, whole))
    assert len(found) == 60
    assert found == expected


@pytest.mark.parametrize(
    ("change", "field"),
    [("--max_new_tokens=7", "max_new_tokens"), ("--drafter=ngram", "drafter")],
)
def test_answers_of_another_configuration_are_refused(run, arguments, change, field):
    assert run(evaluate, *arguments("mt_bench", "--limit=1"))[0] == 0
    code, _, errors = run(evaluate, *arguments("mt_bench", "--limit=1", change))
    assert code == 2 and field in errors and "--overwrite" in errors
    assert run(evaluate, *arguments("mt_bench", "--limit=1", change, "--overwrite"))[0] == 0


def test_answers_to_other_questions_are_refused(run, arguments, tmp_path):
    assert run(evaluate, *arguments("mt_bench", "--limit=1"))[0] == 0
    path = tmp_path / "out" / "mt_bench" / "run.jsonl"
    [row] = benchmark_data.read(path)
    path.write_text(json.dumps(row | {"question_digest": "0"}) + "\n")
    code, _, errors = run(evaluate, *arguments("mt_bench", "--limit=1"))
    assert code == 2 and "answers another question" in errors


def test_bad_input_is_refused_before_the_model_is_loaded(run, arguments, tmp_path):
    good = arguments("mt_bench")
    changes = {
        "--benchmark=mmlu": "supported are mt_bench",
        "--data_dir=/no/such/folder": "not a directory",
        f"--data_dir={tmp_path}": "mt_bench/question.jsonl",
        "--drafter=nogram": "'nogram'",
        "--run_name=a/b": "--run_name",
        "--preset=smollm2-mtbench": "smollm2-mt_bench",
        "--model=no/such.gguf": "no/such.gguf",
    }
    for change, message in changes.items():
        code, _, errors = run(evaluate, *good, change)
        assert code == 2 and message in errors, change
    for name in ("benchmark", "data_dir", "output", "model"):
        rest = [argument for argument in good if not argument.startswith(f"--{name}=")]
        code, _, errors = run(evaluate, *rest)
        assert code == 2 and f"--{name}" in errors
    assert not (tmp_path / "out").exists()


def test_a_damaged_answer_file_is_refused(run, arguments, tmp_path):
    path = tmp_path / "out" / "mt_bench" / "run.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"id": 1\n{"id": 2}\n')
    code, _, errors = run(evaluate, *arguments("mt_bench"))
    assert code == 2 and "run.jsonl:1" in errors and "--overwrite" in errors


def test_one_answer_file_is_scored_again(run, arguments, data, tmp_path):
    more = ("--limit=2", "--max_new_tokens=2")
    assert run(evaluate, *arguments("gsm8k", *more))[0] == 0
    path = tmp_path / "out" / "gsm8k" / "run.jsonl"
    first, second = benchmark_data.read(path)
    assert not first["correct"]
    first["choices"][0]["turns"] = ["Add. The answer is 1,000."]
    second["choices"][0]["turns"] = ["The answer is 5."]
    path.write_text("".join(json.dumps(row) + "\n" for row in (first, second)))
    flags = (f"--answers={path}", f"--data_dir={data}")
    code, printed, errors = run(rescore, *flags)
    assert code == 0, errors
    assert "1 of 2 correct" in printed
    rows = benchmark_data.read(path)
    assert [row["correct"] for row in rows] == [True, False]
    assert rows[0]["prediction"] == "1000" and rows[1]["output_ids"] == second["output_ids"]
    # The file can still be continued.
    assert run(evaluate, *arguments("gsm8k", "--limit=3", "--max_new_tokens=2"))[0] == 0
    assert [row["id"] for row in benchmark_data.read(path)] == [0, 1, 2]


def test_code_is_scored_with_permission_only(run, arguments, data, tmp_path):
    code, printed, errors = run(evaluate, *arguments("human_eval"))
    assert code == 0, errors
    assert "nothing was executed" in printed
    path = tmp_path / "out" / "human_eval" / "run.jsonl"
    rows = benchmark_data.read(path)
    assert [row["correct"] for row in rows] == [None, None]
    rows[0]["choices"][0]["turns"] = ["def add(a, b):\n    return a + b\n```\nDone."]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (f"--answers={path}", f"--data_dir={data}")
    code, _, errors = run(rescore, *flags)
    assert code == 2 and "--allow_code_execution" in errors
    code, printed, errors = run(rescore, *flags, "--allow_code_execution")
    assert code == 0, errors
    assert "1 of 2 correct" in printed
    first, second = benchmark_data.read(path)
    assert first["correct"] and first["completion"] == "def add(a, b):\n    return a + b"
    assert second["correct"] is False and second["outcome"].startswith("failed")
    assert [row["task_id"] for row in (first, second)] == ["HumanEval/0", "HumanEval/1"]


def test_a_run_is_named_after_what_ran():
    def name(model, weights, spec, *more):
        values = common.parse(evaluate.define_flags, [f"--model={model}", "--output=x", *more])
        return evaluate._run_name(values, weights, spec)

    assert name("dir/tiny.gguf", "w4a16 g32", {"kind": "none"}) == "tiny_w4a16-g32_none"
    spec = {"kind": "eagle", "model": "/a/b/head", "num_nodes": 8}
    assert name("smollm2-135m", "dense", spec) == "smollm2-135m_dense_eagle-model=head,-num_nodes=8"
    routed = ("--depth=routed", "--tree_selection=vote")
    assert name("m", "dense", {"kind": "none"}, *routed) == "m_dense_none_routed_vote"


def test_weights_are_described_by_what_is_stored():
    assert evaluate.describe_weights(str(paths.fixture("tiny-fp16"))) == "dense"
    assert evaluate.describe_weights(str(paths.fixture("tiny-gptq-g128"))) == "w4a16 g128"
    assert evaluate.describe_weights(str(paths.fixture("tiny-qqq-g128"))) == "w4a8-qqq g128"


@pytest.mark.slow
def test_rounds_of_a_hierarchical_drafter(run, arguments, tmp_path, tiny):
    flags = ("--drafter=hierarchical", f"--draft_checkpoint={tiny}", "--min_draft_depth=2")
    flags += ("--inner_drafter=ngram", "--limit=1", "--max_new_tokens=8")
    assert run(evaluate, *arguments("human_eval", *flags))[0] == 0
    [row] = benchmark_data.read(tmp_path / "out" / "human_eval" / "run.jsonl")
    [choice] = row["choices"]
    assert set(choice["accept_lengths"]) <= {1, 2, 3, 4}
    assert choice["cascade_accept_lengths"] and min(choice["cascade_accept_lengths"]) >= 1
    assert sum(choice["cascade_accept_lengths"]) <= row["metrics"][0]["num_draft_tokens"]
