import json

import pytest

from experiments import bench_decode
from experiments.shared import common, flags_model, methods, roofline
from specjax.errors import ConfigError
from tests import paths


@pytest.fixture
def prompts(write_rows) -> str:
    rows = [{"id": f"p{i}", "input_ids": list(range(9, 18 + i)) * 2} for i in range(4)]
    return write_rows("prompts.jsonl", rows)


def test_rows_and_table(run, tiny, prompts, tmp_path):
    output = tmp_path / "new" / "bench.jsonl"
    arguments = (
        f"--model={tiny}",
        "--drafters=ngram,none",
        f"--prompts_file={prompts}",
        "--repeats=2",
        "--max_new_tokens=12",
        "--batch_size=2",
        f"--output={output}",
    )
    code, printed, errors = run(bench_decode, *arguments)
    assert code == 0, errors
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    runs = [row for row in rows if row["record"] == "run"]
    summaries = {row["drafter"]: row for row in rows if row["record"] == "summary"}
    assert list(summaries) == ["none", "ngram"]
    assert [(row["drafter"], row["repeat"]) for row in runs] == [
        *(("none", 0), ("none", 1)),
        *(("ngram", 0), ("ngram", 1)),
    ]
    for row in rows:
        assert row["config"]["environment"]["jax"] and row["config"]["max_new_tokens"] == 12
    for row in runs:
        assert row["compile_ms"] == 0
        assert [each["id"] for each in row["per_prompt"]] == ["p0", "p1", "p2", "p3"]
        assert row["new_tokens"] == sum(each["new_tokens"] for each in row["per_prompt"])
        assert sum(row["acceptance_histogram"]) == row["num_spec_steps"]
    assert summaries["none"]["speedup"] == 1
    assert summaries["ngram"]["outputs_equal_to_none"] == 4
    low, high = summaries["ngram"]["tokens_per_s_range"]
    assert low <= summaries["ngram"]["tokens_per_s"] <= high
    assert "ngram" in printed and "yes" in printed
    assert run(bench_decode, *arguments)[0] == 0
    assert len(output.read_text().splitlines()) == 2 * len(rows)


@pytest.mark.slow
def test_specs_from_a_file_and_the_roofline(run, tiny, prompts, tmp_path):
    specs = tmp_path / "specs.json"
    specs.write_text(json.dumps(["none", {"kind": "ngram", "draft_depth": 2}]))
    output = tmp_path / "bench.jsonl"
    code, printed, errors = run(
        bench_decode,
        f"--model={tiny}",
        f"--drafters_file={specs}",
        f"--prompts_file={prompts}",
        "--repeats=1",
        "--max_new_tokens=12",
        "--roofline",
        "--stream_mb=4",
        f"--output={output}",
    )
    assert code == 0, errors
    assert "ngram(draft_depth=2)" in printed and "of the bound" in printed
    row = json.loads(output.read_text().splitlines()[-1])
    assert row["record"] == "roofline"
    assert row["same_tokens"]
    assert row["engine_over_bare"] > 0 and row["bound_tokens_per_s"] > 0


@pytest.mark.slow
def test_speedups_over_plain_decoding_in_another_dtype(run, tiny, prompts, tmp_path):
    output = tmp_path / "bench.jsonl"
    arguments = (
        f"--model={tiny}",
        "--drafters=ngram",
        f"--prompts_file={prompts}",
        "--repeats=1",
        "--max_new_tokens=8",
        "--dtype=bfloat16",
        "--baseline_dtype=float32",
        f"--output={output}",
    )
    code, printed, errors = run(bench_decode, *arguments)
    assert code == 0, errors
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    summaries = {row["drafter"]: row for row in rows if row["record"] == "summary"}
    assert list(summaries) == ["none (float32)", "none", "ngram"]
    assert summaries["none (float32)"]["speedup"] == 1
    base, plain = (summaries[name]["tokens_per_s"] for name in ("none (float32)", "none"))
    assert summaries["none"]["speedup"] == pytest.approx(plain / base)
    for row in summaries.values():
        assert row["outputs_equal_to_none"] == 4
    assert "none (float32)" in printed
    code, _, errors = run(
        bench_decode, "--random_weights=smollm2-135m", "--drafters=none", "--baseline_dtype=float32"
    )
    assert code == 2 and "--baseline_dtype needs --model" in errors


def test_a_step_reads_all_weights_but_one_embedding_row(tiny):
    values = common.parse(bench_decode.define_flags, [f"--model={tiny}", "--prompts_file=p"])
    model = flags_model.load_model(values)
    config = model.config
    layer = config.hidden_size * (2 * 256 + 2 * 128 + 3 * config.intermediate_size + 2)
    weights = config.num_layers * layer + config.hidden_size * (config.vocab_size + 2)
    cache = 2 * config.num_layers * 96 * config.num_kv_heads * config.head_dim
    assert roofline.step_bytes(model, 96) == 4 * (weights + cache)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ('{"kind": "none"}', "expected a list"),
        ('["nogram"]', "nogram"),
        ('[{"kind": "ngram", "depth": 1}]', "depth"),
        ("[5]", "kind"),
    ],
)
def test_bad_specs_are_refused(tmp_path, content, message):
    specs = tmp_path / "specs.json"
    specs.write_text(content)
    arguments = ["--model=m", "--prompts_file=p", f"--drafters_file={specs}"]
    with pytest.raises(ConfigError, match=message):
        methods.chosen(common.parse(bench_decode.define_flags, arguments))


def test_bad_input_exits_with_a_message(run, tiny, prompts, tmp_path):
    arguments = (f"--model={tiny}", f"--prompts_file={prompts}")
    code, _, errors = run(bench_decode, *arguments)
    assert code == 2 and "--drafters" in errors
    code, _, errors = run(bench_decode, *arguments, "--drafters=lm")
    assert code == 2 and "'model'" in errors
    code, _, errors = run(bench_decode, *arguments, "--drafters=none", "--output=x.txt")
    assert code == 2 and ".jsonl" in errors
    more = ("--drafters=none", "--roofline", "--max_new_tokens=1")
    code, _, errors = run(bench_decode, *arguments, *more)
    assert code == 2 and "--roofline" in errors


@pytest.mark.slow
@pytest.mark.usefixtures("hurried")
def test_all_methods_and_their_traces(run, tiny, prompts, tmp_path):
    output = tmp_path / "bench.jsonl"
    code, printed, errors = run(
        bench_decode,
        f"--model={tiny}",
        "--preset=all-methods",
        f"--draft_checkpoints={paths.fixture('eagle2-tiny')}",
        f"--prompts_file={prompts}",
        "--repeats=1",
        "--max_new_tokens=8",
        "--trace",
        f"--output={output}",
    )
    assert code == 0, errors
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    summaries = [row for row in rows if row["record"] == "summary"]
    assert [row["drafter"].split("(")[0] for row in summaries] == ["none", "ngram", "eagle"]
    assert printed.count("drafted ") == 2 and printed.count("resampled ") == 2
    assert "[bonus: " in printed or "[resampled: " in printed
