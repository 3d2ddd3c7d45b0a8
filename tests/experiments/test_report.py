import json
import re

import numpy as np
import pytest

from experiments import report
from experiments.shared import answers, figures, figures_measured, overview, runs, tables

_ENVIRONMENT = {"cpu": "Test CPU", "platform": "cpu", "device_kind": "cpu", "num_cpus": 2}


def _config(name: str, weights: str, kind: str, benchmark: str) -> dict:
    return {
        "benchmark": benchmark,
        "run_name": name,
        "model": f"/models/{weights}",
        "weights": weights,
        "scheme": None,
        "dtype": "float32",
        "max_new_tokens": 8,
        "drafter": {"kind": kind},
        "drafter_label": kind,
        "environment": _ENVIRONMENT,
    }


def _row(config, number, subtask, tokens, seconds, lengths, **more) -> dict:
    """A row with one turn per entry of `tokens`."""
    metrics = {"prefill_ms": 10.0, "compile_ms": 0.0, "lossless": True}
    return {
        "id": number,
        "question_id": number,
        "category": subtask,
        "subtask": subtask,
        "error": None,
        "choices": [
            {
                "index": 0,
                "turns": ["text"] * len(tokens),
                "decoding_steps": [len(lengths)] + [0] * (len(tokens) - 1),
                "new_tokens": tokens,
                "wall_time": seconds,
                "accept_lengths": lengths,
                "generate_speed": [
                    t / s if s else None for t, s in zip(tokens, seconds, strict=True)
                ],
            }
        ],
        "metrics": [{"decode_ms": 1e3 * each, **metrics} for each in seconds],
        "config": config,
        **more,
    }


@pytest.fixture
def plain() -> list[dict]:
    config = _config("plain", "dense", "none", "bench")
    return [
        _row(config, 1, "writing", [10, 10], [1.0, 1.0], [1] * 18, correct=True),
        _row(config, 2, "math", [30], [1.0], [1] * 29, correct=False),
    ]


@pytest.fixture
def drafted() -> list[dict]:
    config = _config("drafted", "dense", "ngram", "bench")
    return [
        _row(config, 1, "writing", [10, 10], [0.5, 0.5], [2, 2, 3, 2], correct=True),
        _row(config, 2, "math", [30], [1.0], [3, 1], correct=False),
    ]


@pytest.fixture
def write(tmp_path):
    def put(name: str, rows: list[dict], tail: str = "") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
        return str(path)

    return put


def test_speeds_as_the_reference_defines_them(plain, drafted):
    # Questions at 10 and 30 tokens/s: the mean is 20, whatever their lengths.
    assert answers.mean_speed(plain) == pytest.approx(20)
    assert answers.mean_speed(drafted) == pytest.approx(25)
    assert answers.mean_accepted(drafted) == pytest.approx(13 / 6)
    assert answers.accuracy(plain) == (1, 2)
    assert answers.accuracy([{"correct": None}, {}]) is None


def test_ratios_over_common_questions(write, plain, drafted):
    extra = _row(drafted[0]["config"], 3, "math", [100], [1.0], [5])
    paths = [write("a.jsonl", plain), write("b.jsonl", [*drafted, extra])]
    results = runs.read(list(map(_path, paths)))
    comparison = results.by_benchmark()["bench"]
    base, other = comparison.runs
    assert comparison.baseline is base and base.is_plain
    assert runs.speedup(other, base) == pytest.approx(25 / 20)
    np.testing.assert_allclose(runs.ratios(other, base), [2, 1])
    assert runs.speedup(other, base, "writing") == pytest.approx(2)
    assert runs.speedup(other, base, "no such") is None
    assert comparison.plain_of(other) is base
    assert comparison.subtasks() == ["writing", "math"]


def _path(name: str):
    from pathlib import Path

    return Path(name)


def test_a_report_with_figures(run, write, plain, drafted, tmp_path):
    names = ("dense", "w4a16 g64")
    for index, weights in enumerate(names):
        for kind, rows in (("none", plain), ("ngram", drafted)):
            config = _config(f"{index}-{kind}", weights, kind, "bench")
            write(f"in/{index}{kind}.jsonl", [row | {"config": config} for row in rows])
    write(
        "in/more.jsonl",
        [
            {
                "record": "verify_times",
                "label": "dense",
                "num_nodes": [1, 8],
                "verify_ms": verify_ms,
            }
            for verify_ms in ([2.0, 8.0], [2.0, 3.0])
        ]
        + [
            {
                "record": "step_times",
                "label": "dense, ngram(draft_depth=3)",
                "config": {"weights": "dense", "drafter": {"kind": "ngram", "draft_depth": 3}},
                "num_nodes": 8,
                "propose_ms": 1.0,
                "verify_ms": 3.0,
                "other_ms": 0.5,
                "step_ms": 4.5,
            },
            {"record": "something else"},
        ],
    )
    output = tmp_path / "out"
    code, printed, errors = run(report, f"--inputs={tmp_path / 'in'}", f"--output={output}")
    assert code == 0, errors
    assert "4 runs" in printed
    text = (output / "report.md").read_text()
    shown = re.findall(r"\]\((.*?)\)", text)
    assert sorted(shown) == sorted(path.name for path in output.glob("*.png"))
    assert set(shown) == {
        *("bench_speedup.png", "bench_categories.png", "bench_acceptance.png"),
        *("bench_quality.png", "verify_times.png", "time_split.png"),
    }
    assert all((output / name).with_suffix(".svg").stat().st_size > 1000 for name in shown)
    assert (output / "bench_speedup.png").read_bytes().startswith(b"\x89PNG")
    lines = text.splitlines()
    assert (
        "| dense | ngram | 2 | 25.0 | 1.25 | 1.50 (1.25 - 1.75) | 1.25 | 2.17 | 1 of 2 (50.0%) |"
        in lines
    )
    assert "| dense | ngram | 2.00 | 1.00 | 1.25 |" in lines
    assert "| dense | ngram | 6 | 2.17 | 16.7% | 50.0% | 33.3% |" in lines
    assert "| dense, ngram | 8 | 1.00 | 3.00 | 0.50 | 4.50 |" in lines
    assert "| dense | 2.00 | 1.00 | 4.00 |" not in lines, "not the newest of two measurements"
    assert "| dense | 2.00 | 1.00 | 1.50 |" in lines
    assert "Speed-ups refer to dense, drafter none (`0-none`)." in text


def test_the_same_results_give_the_same_files(run, write, plain, drafted, tmp_path):
    inputs = f"--inputs={write('a.jsonl', plain)},{write('b.jsonl', drafted)}"
    for name in ("one", "two"):
        assert run(report, inputs, f"--output={tmp_path / name}")[0] == 0
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) > 4
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), (
            name
        )


def test_without_a_baseline_there_are_no_speedups(run, write, drafted, tmp_path):
    inputs = f"--inputs={write('b.jsonl', drafted)}"
    assert run(report, inputs, f"--output={tmp_path / 'out'}", "--nofigures")[0] == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "No run decodes plainly" in text and "![" not in text


def test_questions_without_an_answer_are_counted(run, write, plain, tmp_path):
    failed = plain[1] | {"error": "too long"}
    failed["choices"] = [failed["choices"][0] | {"wall_time": [], "new_tokens": [], "turns": []}]
    inputs = f"--inputs={write('a.jsonl', [plain[0], failed])}"
    assert run(report, inputs, f"--output={tmp_path / 'out'}", "--nofigures")[0] == 0
    assert "| 1 (of 2) |" in (tmp_path / "out" / "report.md").read_text()


def test_a_cut_line_is_left_out(write, plain, caplog):
    results = runs.read([_path(write("a.jsonl", plain, tail='{"id": 3, "choi'))])
    assert len(results.runs[0].rows) == 2
    assert "a.jsonl:3: cut short" in caplog.text


def test_bad_input_is_refused(run, write, plain, tmp_path):
    output = f"--output={tmp_path / 'out'}"
    good = write("a.jsonl", plain)
    twice = write("b.jsonl", plain)
    broken = write("c.jsonl", plain[:1], tail="{\n" + json.dumps(plain[1]))
    empty = write("d.jsonl", [{"record": "other"}])
    changes = {
        f"--inputs={tmp_path / 'gone'}": "gone does not exist",
        f"--inputs={good},{twice}": "'plain' of bench is in both",
        f"--inputs={broken}": "c.jsonl:2: not valid JSON",
        f"--inputs={empty}": "no results",
    }
    for change, message in changes.items():
        code, _, errors = run(report, change, output)
        assert code == 2 and message in errors, change
    code, _, errors = run(report, f"--inputs={good}", output, "--baseline=other")
    assert code == 2 and "there are: plain" in errors
    code, _, errors = run(report, f"--inputs={good}", output, "--formats=gif")
    assert code == 2 and "supported are png, svg, pdf" in errors
    assert not (tmp_path / "out").exists()


def test_figures_without_data_are_left_out(plain):
    assert figures_measured.verify_times([]) is None
    assert figures_measured.time_split([]) is None
    run = runs._run(plain, "none")
    comparison = runs.Comparison(runs=[run], baseline=run)
    assert figures.acceptance(comparison) is None
    assert figures.categories(comparison) is None
    assert tables.acceptance(comparison) == "No run drafts."


def test_the_overview_holds_what_the_report_says(run, tmp_path, plain, drafted):
    """From rows through report.md: the speeds of its first tables, and nothing else in it."""
    for name, rows in {"plain": plain, "drafted": drafted}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = str(tmp_path / "report")
    assert run(report, f"--inputs={tmp_path}", f"--output={output}", "--nofigures")[0] == 0
    rows, conditions = overview.read(tmp_path / "report" / "report.md")
    results = runs.read([tmp_path])
    expected = {(found.weights, found.drafter): found for found in results.runs}
    assert len(rows) == len(expected) == 2
    for row in rows:
        found = expected[row.weights, row.drafter]
        assert row.benchmark == "bench"
        assert row.tokens_per_s == pytest.approx(answers.mean_speed(found.answered), abs=0.05)
    assert conditions == "dense in float32 on Test CPU (2 processors)"
    source = f"--overview={tmp_path / 'report' / 'report.md'}"
    assert run(report, source, f"--output={output}", "--formats=svg")[0] == 0
    text = (tmp_path / "report" / "overview.svg").read_text()
    assert "plain decoding" in text and "Test CPU" in text
    for row in rows:
        assert f">{row.tokens_per_s:.0f}<" in text


def test_an_overview_needs_a_report_and_nothing_else(run, tmp_path):
    other = tmp_path / "other.md"
    other.write_text("# No report\n\n| a | b |\n")
    for arguments in (
        [f"--overview={other}"],
        [f"--overview={other}", "--inputs=x"],
        [],
        [f"--overview={tmp_path / 'missing.md'}"],
    ):
        code, _, error = run(report, *arguments, f"--output={tmp_path}")
        assert (code, error.count("\n")) == (2, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["other.md"]
