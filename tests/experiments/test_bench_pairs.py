"""The binary that compares two models under their own quantizations: its methods, rows, table and trace."""

import json

import pytest

from experiments import bench_pairs
from experiments.shared import common
from specjax.errors import ConfigError
from tests import paths, tiny

PROMPTS = 2


@pytest.fixture
def arguments(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": i, "input_ids": ids} for i, ids in enumerate(tiny.prompts()[:PROMPTS])]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"--model={paths.fixture('tiny-fp16')}",
        f"--prompts_file={prompts}",
        *("--repeats=1", "--max_new_tokens=10", "--dtype=float32", "--ignore_eos"),
    ]


def run(arguments) -> None:
    with tiny.hurried_compiler():
        bench_pairs.main(common.parse(bench_pairs.define_flags, arguments))


@pytest.mark.slow
def test_all_methods_are_measured(arguments, tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    run([*arguments, "--draft_quantization=int4", "--trace", f"--output={output}"])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    summaries = {row["method"]: row for row in rows if row["record"] == "summary"}
    assert list(summaries) == ["target", "draft", "speculative", "qspec"]
    assert len(rows) == 2 * len(summaries)
    for name in ("target", "speculative", "qspec"):
        assert summaries[name]["outputs_equal_to_target"] == PROMPTS
        assert summaries[name]["lossless"]
    assert summaries["target"]["num_draft_tokens"] == 0
    # The draft as it is stored is nearly the target rounded to int8; rounded to int4 it is further away.
    rates = [summaries[name]["draft_acceptance_rate"] for name in ("speculative", "qspec")]
    assert rates[0] > 0.5 and rates[1] <= rates[0]
    assert 0 < summaries["qspec"]["system_efficiency"] <= 1
    config = rows[0]["config"]
    assert config["schemes"] == {"draft": "w4a16", "verify": "w8a16"}
    assert config["environment"]
    out = capsys.readouterr().out
    assert "qspec / target" in out and "accepted" in out and "resampled" in out


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ("--draft_quantization=int3", "supported are none, int8"),
        ("--scheme=w4a8", "use --verify_quantization"),
        ("--output=x.txt", r"a \.jsonl file"),
    ],
)
def test_bad_input_is_named(arguments, extra, match):
    with pytest.raises(ConfigError, match=match):
        run([*arguments, extra])
