import pytest

from experiments import report, step_times
from tests import tiny as models
from tests.experiments import benchmark_data


@pytest.fixture
def arguments(tiny, write_rows, tmp_path):
    prompts = write_rows("prompts.jsonl", [{"input_ids": list(range(9, 29)) * 2}])
    return [
        f"--model={tiny}",
        f"--prompts_file={prompts}",
        f"--output={tmp_path / 'steps.jsonl'}",
        *("--sizes=4,2", "--repeats=2"),
    ]


@pytest.mark.parametrize(
    "drafter", ["none", *(pytest.param(n, marks=pytest.mark.slow) for n in ("ngram", "self"))]
)
def test_parts_of_a_step(run, arguments, tmp_path, drafter):
    with models.hurried_compiler():
        code, printed, errors = run(step_times, *arguments, f"--drafter={drafter}")
    assert code == 0, errors
    parts, passes = benchmark_data.read(tmp_path / "steps.jsonl")
    assert parts["record"] == "step_times" and parts["label"] == f"dense, {drafter}"
    assert min(parts[f"{name}_ms"] for name in ("propose", "verify", "step")) > 0
    total = parts["propose_ms"] + parts["verify_ms"] + parts["other_ms"]
    assert total == pytest.approx(parts["step_ms"])
    assert passes["num_nodes"] == [1, 2, 4] and len(passes["verify_ms"]) == 3
    assert min(passes["verify_ms"]) > 0 and passes["config"]["environment"]["jax"]
    assert "T(4)" in printed and "propose" in printed
    output = tmp_path / "report"
    code, _, errors = run(report, f"--inputs={tmp_path / 'steps.jsonl'}", f"--output={output}")
    assert code == 0, errors
    assert f"| dense, {drafter} |" in (output / "report.md").read_text()
    assert (output / "time_split.png").exists() and (output / "verify_times.svg").exists()


def test_bad_input_is_refused(run, arguments, tmp_path):
    for change, message in (
        ("--sizes=0", "--sizes"),
        ("--sizes=a", "--sizes"),
        ("--drafter=lm", "model"),
    ):
        code, _, errors = run(step_times, *arguments, change)
        assert code == 2 and message in errors
    assert not (tmp_path / "steps.jsonl").exists()
