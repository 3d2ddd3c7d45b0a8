import pytest

from experiments import demo
from experiments.shared import prompt_files


def test_the_demo_compares_drafters(run, tiny, write_rows):
    prompts = write_rows("p.jsonl", [{"id": "a", "input_ids": [9, 10, 11] * 5}])
    code, printed, errors = run(
        demo, f"--model={tiny}", f"--prompts_file={prompts}", "--max_new_tokens=12"
    )
    assert code == 0, errors
    assert "drafter: none" in printed and "drafter: ngram" in printed
    assert printed.count("yes") == 2


def test_a_changed_text_is_an_error(run, tiny, write_rows, monkeypatch):
    prompts = write_rows("p.jsonl", [{"id": "a", "input_ids": [9, 10, 11] * 5}])
    stream, answers = demo._stream, []

    def wrong(*arguments):
        answers.append(stream(*arguments))
        if len(answers) == 2:
            answers[1].output_ids[-1] += 1
        return answers[-1]

    monkeypatch.setattr(demo, "_stream", wrong)
    with pytest.raises(SystemExit, match="1"):
        run(demo, f"--model={tiny}", f"--prompts_file={prompts}", "--max_new_tokens=12")


def test_the_built_in_prompts_are_read():
    assert len(prompt_files.read_prompts(demo._PROMPTS)) == 3
