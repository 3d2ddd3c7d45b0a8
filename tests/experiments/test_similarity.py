import json

import numpy as np
import pytest

import specjax
from experiments import report, similarity
from tests import paths
from tests import tiny as models
from tests.experiments import benchmark_data


@pytest.fixture
def arguments(write_rows, tmp_path):
    rows = [{"id": f"p{i}", "input_ids": list(range(9, 20 + i))} for i in range(3)]
    return [
        f"--model={paths.fixture('tiny-gptq-g128')}",
        f"--prompts_file={write_rows('prompts.jsonl', rows)}",
        "--max_new_tokens=10",
        f"--output={tmp_path / 'similarity.jsonl'}",
    ]


@pytest.fixture(autouse=True, scope="module")
def hurry():
    with models.hurried_compiler():
        yield


def test_first_choices_of_two_schemes(run, arguments, tmp_path):
    code, printed, errors = run(similarity, *arguments, "--candidate=w4a4")
    assert code == 0, errors
    *rows, summary = benchmark_data.read(tmp_path / "similarity.jsonl")
    assert [row["id"] for row in rows] == ["p0", "p1", "p2"]
    model = specjax.load(arguments[0].removeprefix("--model="), dequantize="never")
    other = model.module.with_scheme("w4a4")
    matches = total = 0
    for index, row in enumerate(rows):
        prompt = list(range(9, 20 + index))
        # Greedy decoding chose the reference's first choices.
        assert row["reference_ids"] == row["output_ids"]
        logits = models.full_logits(other, [*prompt, *row["output_ids"]])[len(prompt) - 1 : -1]
        assert row["candidate_ids"] == logits.argmax(-1).tolist()
        top = np.exp(logits.max(-1) - np.logaddexp.reduce(logits.astype(np.float64), axis=-1))
        np.testing.assert_allclose(row["candidate_top"], top, rtol=1e-4)
        matches += sum(a == b for a, b in zip(row["output_ids"], row["candidate_ids"], strict=True))
        total += len(row["output_ids"])
    assert (
        summary["num_positions"]
        == total
        == np.sum(summary["histogram_same"]) + np.sum(summary["histogram_other"])
    )
    assert np.sum(summary["histogram_same"]) == matches < total
    assert summary["match_rate"] == pytest.approx(matches / total)
    assert summary["reference"] == "w4a16 g128" and summary["candidate"] == "w4a4"
    assert f"{matches / total:.1%}" in printed


def test_a_scheme_agrees_with_itself(run, arguments, tmp_path):
    assert run(similarity, *arguments, "--candidate=w4a16")[0] == 0
    summary = benchmark_data.read(tmp_path / "similarity.jsonl")[-1]
    assert summary["match_rate"] == 1 and np.sum(summary["histogram_other"]) == 0
    histogram = np.asarray(summary["histogram_same"])
    assert histogram.sum() == np.trace(histogram)
    output = tmp_path / "report"
    code, _, errors = run(report, f"--inputs={tmp_path / 'similarity.jsonl'}", f"--output={output}")
    assert code == 0, errors
    assert "| tiny-gptq-g128 | w4a16 g128 | w4a16 |" in (output / "report.md").read_text()
    assert (output / "similarity_0.png").stat().st_size > 5000


def test_rates_by_hand():
    row = {
        "reference_ids": [1, 2, 3, 4],
        "candidate_ids": [1, 2, 9, 8],
        "reference_top": [0.97, 0.32, 0.92, 1.0000001],
        "candidate_top": [0.92, 0.32, 0.52, 0.22],
    }
    found = similarity.summarize([row])
    assert found["match_rate"] == 0.5
    assert found["reference_confident"] == 0.75
    assert found["match_rate_confident"] == pytest.approx(1 / 3)
    assert np.asarray(found["histogram_same"])[19, 18] == 1
    assert np.asarray(found["histogram_other"])[19, 4] == 1
    unsure = similarity.summarize([{**row, "reference_top": [0.1] * 4}])
    assert unsure["match_rate_confident"] is None


def test_bad_input_is_refused(run, arguments, tiny, tmp_path):
    changes = {
        (): "--candidate",
        ("--candidate=w4a5",): "w4a5",
        ("--candidate=w8a8",): "w8a8",
        ("--candidate=w4a4", f"--model={tiny}"): "w4a4",
        ("--candidate=w4a4", "--benchmark=gsm8k"): "either",
        ("--candidate=w4a4", "--output=x.txt"): ".jsonl",
    }
    for change, message in changes.items():
        code, _, errors = run(similarity, *arguments, *change)
        assert code == 2 and message in errors, change
    assert not (tmp_path / "similarity.jsonl").exists()


def test_questions_of_a_benchmark(run, tiny, tmp_path):
    data = benchmark_data.write(tmp_path / "data")
    (tmp_path / "chat.jinja").write_text(benchmark_data.CHAT_TEMPLATE)
    code, _, errors = run(
        similarity,
        f"--model={paths.fixture('tiny-gptq-g128')}",
        f"--chat_template={tmp_path / 'chat.jinja'}",
        "--candidate=w4a8",
        "--benchmark=human_eval",
        f"--data_dir={data}",
        "--limit=1",
        "--max_new_tokens=4",
        f"--output={tmp_path / 'out.jsonl'}",
    )
    assert code == 0, errors
    rows = benchmark_data.read(tmp_path / "out.jsonl")
    assert [row.get("id") for row in rows] == ["HumanEval/0", None]
    assert json.dumps(rows[-1]["config"]["prompts"]) == '"human_eval"'
