import json

import pytest

from experiments import generate
from tests import paths

_FIELDS = (
    *("id", "input_ids", "output_ids", "text", "finish_reason", "new_tokens", "num_spec_steps"),
    *("mean_acceptance_length", "acceptance_histogram", "draft_acceptance_rate", "prefill_ms"),
    *("decode_ms", "compile_ms", "tokens_per_s", "batch_size", "config"),
)


@pytest.fixture(scope="module")
def golden() -> list[dict]:
    lines = paths.golden("tiny-fp16_greedy.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def prompts(write_rows, golden) -> str:
    return write_rows(
        "prompts.jsonl",
        [{"id": f"row{i}", "input_ids": row["input_ids"]} for i, row in enumerate(golden[:5])],
    )


def _read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_greedy_rows_equal_the_goldens(run, tiny, golden, write_rows, tmp_path, batch_size):
    rows = [{"id": i, "input_ids": row["input_ids"], "x": 0} for i, row in enumerate(golden)]
    output = tmp_path / "new" / "out.jsonl"
    code, _, errors = run(
        generate,
        f"--model={tiny}",
        f"--prompts_file={write_rows('p.jsonl', rows)}",
        f"--output={output}",
        "--max_new_tokens=64",
        "--dtype=float32",
        f"--batch_size={batch_size}",
    )
    assert code == 0, errors
    found = _read(output)
    if batch_size == 1:
        assert [row["id"] for row in found] == list(range(len(golden)))
    by_id = {row["id"]: row for row in found}
    for i, expected in enumerate(golden):
        assert by_id[i]["output_ids"] == expected["greedy_ids"]
        assert by_id[i]["batch_size"] == batch_size
        assert set(_FIELDS) <= by_id[i].keys()
        assert by_id[i]["config"]["dtype"] == "float32"


def _sampled(tiny, prompts, output, *more: str) -> list[str]:
    return [
        f"--model={tiny}",
        f"--prompts_file={prompts}",
        f"--output={output}",
        "--max_new_tokens=24",
        "--temperature=1.0",
        "--drafter=ngram",
        "--seed=3",
        *more,
    ]


def test_an_interrupted_run_continues_with_the_same_tokens(run, tiny, prompts, tmp_path):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    assert run(generate, *_sampled(tiny, prompts, whole))[0] == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    broken.write_bytes(b"".join([lines[3], lines[1], lines[0][:70]]))
    assert run(generate, *_sampled(tiny, prompts, broken, "--batch_size=2"))[0] == 0
    assert broken.read_bytes().startswith(lines[3] + lines[1])
    expected = {row["id"]: row["output_ids"] for row in _read(whole)}
    found = _read(broken)
    assert len(found) == len(expected)
    assert {row["id"]: row["output_ids"] for row in found} == expected
    assert len({row["config"]["fingerprint"] for row in found}) == 1
    code, printed, _ = run(generate, *_sampled(tiny, prompts, broken))
    assert code == 0 and "nothing to do" in printed


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("--seed=4", "seed"),
        ("--max_new_tokens=25", "max_new_tokens"),
        ("--draft_depth=3", "drafter"),
        ("--dtype=bfloat16", "dtype"),
        ("--stop=the", "stop"),
    ],
)
def test_a_file_of_another_configuration_is_refused(
    run, tiny, prompts, tmp_path, golden, change, field
):
    output = tmp_path / "out.jsonl"
    first = _sampled(tiny, prompts, output)
    assert run(generate, *first)[0] == 0
    before = output.read_bytes()
    code, _, errors = run(generate, *first, change)
    assert code == 2
    assert f"{field} was" in errors and "--overwrite" in errors
    assert output.read_bytes() == before


def test_overwrite_starts_anew(run, tiny, prompts, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("not a result at all\n" * 3)
    code, _, errors = run(generate, *_sampled(tiny, prompts, output))
    assert code == 2 and "out.jsonl:1" in errors
    assert run(generate, *_sampled(tiny, prompts, output, "--overwrite"))[0] == 0
    assert len(_read(output)) == 5


def test_other_prompts_under_the_same_ids_are_refused(run, tiny, prompts, write_rows, tmp_path):
    output = tmp_path / "out.jsonl"
    assert run(generate, *_sampled(tiny, prompts, output))[0] == 0
    other = write_rows("other.jsonl", [{"id": "row1", "input_ids": [5, 6]}])
    code, _, errors = run(generate, *_sampled(tiny, other, output))
    assert code == 2 and "'row1' was made from another prompt" in errors


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": []}, "empty"),
        ({"text": ""}, "empty"),
        ({"input_ids": [1, 5000]}, "5000"),
        ({"input_ids": [1] * 2048}, "2048 tokens"),
        ({"prompt": "hi"}, "chat template"),
        ({"turns": []}, "one of input_ids"),
        ({"text": "a\ud800"}, "half a surrogate pair"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "type='audio'"),
    ],
)
def test_bad_prompts_are_named_before_anything_is_written(
    run, tiny, write_rows, tmp_path, row, message
):
    prompts = write_rows("p.jsonl", [{"id": 0, "input_ids": [4]}, {"id": "bad", **row}])
    output = tmp_path / "sub" / "out.jsonl"
    code, _, errors = run(
        generate, f"--model={tiny}", f"--prompts_file={prompts}", f"--output={output}"
    )
    assert code == 2
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert "p.jsonl:2" in errors and message in errors
    assert not output.parent.exists()


def test_missing_and_contradictory_inputs(run, tiny, tmp_path):
    model = f"--model={tiny}"
    missing = tmp_path / "none.jsonl"
    for arguments, message in (
        ([f"--prompts_file={missing}", f"--output={tmp_path / 'o'}"], "none.jsonl"),
        ([f"--prompts_file={missing}"], "--output"),
        (["--prompt=x", f"--prompts_file={missing}"], "either"),
        ([], "either"),
        (["--prompt=x", "--raw", "--drafter=nogram"], "nogram"),
        (["--prompt=x", "--raw", "--chat_template=no-such-file"], "no-such-file"),
        (["--prompt=", "--raw"], "empty"),
        (["--prompt=x", "--raw", "--temperature=1", "--acceptance=greedy"], "acceptance"),
        (["--prompt=x", "--raw", "--temperature=nan"], "temperature=nan"),
        (["--prompt=x", "--raw", "--top_p=0"], "top_p=0"),
        (["--prompt=x", "--raw", "--stop="], "empty stop string"),
        (["--prompt=x", "--raw", "--stop_token_ids=5000"], "5000 is no token id"),
        (["--prompt=x", "--continue_final_message", "--add_generation_prompt"], "exclude"),
    ):
        code, _, errors = run(generate, model, *arguments)
        assert code == 2, arguments
        assert message in errors
    assert list(tmp_path.iterdir()) == []


def test_fields_take_precedence_and_templates_are_applied(run, tiny, write_rows, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}bot:")
    messages = [{"role": "user", "content": "Hello there"}]
    rows = [
        {"id": "ids", "input_ids": [7, 8], "text": "no", "prompt": "no"},
        {"id": "messages", "messages": messages, "text": "no", "prompt": "no"},
        {"id": "text", "text": "Hello there", "prompt": "no"},
        {"id": "prompt", "prompt": "Hello there"},
    ]
    output = tmp_path / "out.jsonl"
    code, _, errors = run(
        generate,
        f"--model={tiny}",
        f"--prompts_file={write_rows('p.jsonl', rows)}",
        f"--output={output}",
        f"--chat_template={template}",
        "--max_new_tokens=4",
    )
    assert code == 0, errors
    ids = {row["id"]: row["input_ids"] for row in _read(output)}
    assert ids["ids"] == [7, 8]
    assert ids["messages"] == ids["prompt"]
    assert len(ids["messages"]) > len(ids["text"])


def test_flags_say_how_conversations_and_generations_end(run, tiny, write_rows, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}bot:{% endif %}"
    )
    rows = [{"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello there"}]}]}]
    prompts = write_rows("p.jsonl", rows)

    def answer(name, *flags):
        output = tmp_path / name
        common = [f"--model={tiny}", f"--prompts_file={prompts}", f"--chat_template={template}"]
        code, _, errors = run(generate, *common, f"--output={output}", "--max_new_tokens=3", *flags)
        assert code == 0, errors
        return _read(output)[0]

    usual, closed = answer("a"), answer("b", "--noadd_generation_prompt")
    continued = answer("c", "--continue_final_message")
    prompt = lambda row: row["input_ids"]
    assert prompt(usual)[: len(prompt(closed))] == prompt(closed)
    assert prompt(closed)[: len(prompt(continued))] == prompt(continued)
    assert len(prompt(usual)) > len(prompt(closed)) > len(prompt(continued))
    first = usual["output_ids"][0]
    stopped = answer("d", f"--stop_token_ids={first}", "--stop_token_ids=9", "--ignore_eos")
    assert (stopped["output_ids"], stopped["finish_reason"]) == ([first], "stop")
    assert stopped["config"]["stop_token_ids"] == [first, 9]


def test_a_prompt_is_streamed_with_a_summary(run, tiny, tmp_path):
    output = tmp_path / "out.jsonl"
    arguments = (f"--model={tiny}", "--prompt=hello world", "--raw", "--max_new_tokens=20")
    code, printed, errors = run(generate, *arguments, "--drafter=ngram", f"--output={output}")
    assert code == 0, errors
    (row,) = _read(output)
    text, _, summary = printed.rstrip("\n").rpartition("\n")
    assert text == row["text"]
    assert summary.startswith("[20 tokens") and "acceptance length" in summary


def test_stop_strings_cut_the_text(run, tiny):
    arguments = (f"--model={tiny}", "--prompt=hello world", "--raw", "--max_new_tokens=20")
    whole = run(generate, *arguments)[1].rpartition("\n[")[0]
    stop = whole[5:8]
    code, printed, _ = run(generate, *arguments, f"--stop={stop}", "--stop=zzz")
    text, _, summary = printed.rstrip("\n").rpartition("\n")
    assert code == 0
    assert text == whole[: whole.index(stop)]
    assert "ended by stop" in summary
