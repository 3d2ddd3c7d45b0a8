import json

import pytest

from experiments.shared import prompt_files, records
from specjax.errors import ConfigError


def _write(path, text: str):
    path.write_bytes(text.encode())
    return path


def _row(name, **config) -> str:
    return json.dumps({"id": name, "config": config})


def test_prompts_take_the_first_field_in_order_of_precedence(tmp_path):
    everything = {
        "prompt": "p",
        "text": "t",
        "messages": [{"role": "user", "content": "m"}],
        "input_ids": [1],
        "turns": 3,
    }
    lines = []
    for name in ("input_ids", "messages", "text", "prompt"):
        lines.append(json.dumps({"id": name, **everything}))
        everything[name] = None
    path = _write(tmp_path / "p.jsonl", "\n\n".join(lines))
    rows = prompt_files.read_prompts(path)
    assert [list(row["row"]) for row in rows] == [[row["id"]] for row in rows]
    assert [row["line"] for row in rows] == [1, 3, 5, 7]


def test_rows_without_id_are_numbered(tmp_path):
    path = _write(tmp_path / "p.jsonl", '{"prompt": "a\u2028b"}\n{"prompt": "c"}\n')
    assert [row["id"] for row in prompt_files.read_prompts(path)] == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": 1, "prompt": "a"}\n{"id": 2, "prompt": ', r"p\.jsonl:2: not valid JSON"),
        ('{"id": 1, "prompt": "a"}\n["b"]', r"p\.jsonl:2: expected an object"),
        ('{"id": 1, "turns": ["a"]}', r"p\.jsonl:1: fields \['id', 'turns'\]; one of input_ids"),
        ('{"id": 1, "input_ids": "12"}', r"p\.jsonl:1: input_ids: expected a list of token ids"),
        ('{"id": 1, "input_ids": [1, 2.5]}', "input_ids: expected a list of token ids"),
        ('{"id": 1, "messages": ["hi"]}', r"p\.jsonl:1: messages\[0\]: expected an object"),
        ('{"messages": "hi"}', r"p\.jsonl:1: messages: expected a list"),
        ('{"messages": [{"role": "user"}]}', r"p\.jsonl:1: messages\[0\]: content is missing"),
        ('{"id": "\\ud800", "text": "a"}', r"p\.jsonl:1: id is not Unicode"),
        ('{"id": 1, "text": "\\ud800"}', r"p\.jsonl:1: text is not Unicode"),
        ('{"id": true, "text": "a"}', r"p\.jsonl:1: id=True: expected a string"),
        ('{"id": 1, "text": ' + "[" * 100_000, r"p\.jsonl:1: not valid JSON"),
        ('{"id": ' + "1" * 5000 + "}", r"p\.jsonl:1: not valid JSON"),
        ('{"id": 1, "text": 5}', "text: expected a string"),
        ('{"id": [1], "text": "a"}', r"id=\[1\]"),
        ('{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}', r"p\.jsonl:2: id=1 occurs on line 1"),
        ("\n \n", "no rows"),
    ],
)
def test_malformed_prompts_name_the_line(tmp_path, text, message):
    path = _write(tmp_path / "p.jsonl", text)
    with pytest.raises(ConfigError, match=message):
        prompt_files.read_prompts(path)


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    path = _write(tmp_path / "p.jsonl", '\ufeff{"text": "a"}\n')
    assert [row["row"] for row in prompt_files.read_prompts(path)] == [{"text": "a"}]


def test_prompts_that_are_not_text_are_refused(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        prompt_files.read_prompts(path)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", []),
        (_row(1) + "\n", [1]),
        (_row(1), [1]),
        (_row(1) + "\n" + _row(2)[:9], [1]),
        (_row(1) + "\n" + _row(2)[:9] + "\n", [1]),
        (_row(1) + "\n" + _row(2) + "\n\n", [1, 2]),
        (_row(1)[:5], []),
        (_row(1) + "\n\0\0\0", [1]),
    ],
)
def test_a_broken_last_line_is_repaired_when_a_row_is_added(tmp_path, text, kept):
    path = _write(tmp_path / "o.jsonl", text)
    with records.Records(path) as output:
        assert [row["id"] for row in output.rows] == kept
        assert path.read_text() == text
        output.append({"id": 9, "config": {}})
    lines = path.read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines if line] == [*kept, 9]


def test_rows_are_in_the_file_at_once(tmp_path):
    path = tmp_path / "new" / "o.jsonl"
    output = records.Records(path)
    assert not path.parent.exists()
    output.append({"id": "a", "config": {}})
    assert json.loads(path.read_text())["id"] == "a"
    output.close()


@pytest.mark.parametrize("line", ["{broken", "[1]", '{"id": 1}'])
def test_a_broken_line_in_the_middle_is_refused_by_its_number(tmp_path, line):
    text = f"{_row(1)}\n{line}\n{_row(3)}\n"
    path = _write(tmp_path / "o.jsonl", text)
    with pytest.raises(ConfigError, match=r"o\.jsonl:2: .*--overwrite"):
        records.Records(path)
    assert path.read_text() == text
    with records.Records(path, overwrite=True) as output:
        output.append({"id": 9, "config": {}})
    assert json.loads(path.read_text())["id"] == 9


@pytest.mark.parametrize("text", ["some notes", '{"prompt": "a"}\n', "[1]"])
def test_a_file_of_something_else_is_not_repaired(tmp_path, text):
    path = _write(tmp_path / "o.jsonl", text)
    with pytest.raises(ConfigError, match=r"o\.jsonl:1"):
        records.Records(path)


def test_another_configuration_is_refused_by_field(tmp_path):
    path = _write(tmp_path / "o.jsonl", _row(1, seed=1, stop=["a"]) + "\n")
    output = records.Records(path)
    output.check_config({"seed": 1, "stop": ("a",), "other": 3}, ["seed", "stop"])
    with pytest.raises(ConfigError, match=r"row 1 .*seed was 1, now 2.*--overwrite"):
        output.check_config({"seed": 2, "stop": ["a"]}, ["seed", "stop"])


def test_fingerprint_depends_on_the_fields_named():
    config = {"seed": 1, "environment": "x"}
    same = records.fingerprint(config | {"environment": "y"}, ["seed"])
    assert records.fingerprint(config, ["seed"]) == same
    assert records.fingerprint(config | {"seed": 2}, ["seed"]) != same


def test_places_that_cannot_be_written_are_refused_early(tmp_path):
    with pytest.raises(IsADirectoryError):
        records.Records(tmp_path)
    _write(tmp_path / "file", "")
    with pytest.raises(NotADirectoryError):
        records.Records(tmp_path / "file" / "o.jsonl")
    with pytest.raises(ConfigError, match=r"\.json file"):
        records.check_output(tmp_path / "o.txt", ".json")


def test_atomic_files_appear_complete_or_not_at_all(tmp_path):
    target = tmp_path / "sub" / "a.json"
    with pytest.raises(RuntimeError), records.atomic(target) as path:
        path.write_text("half")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    with records.atomic(target) as path:
        path.write_text("whole")
        assert not target.exists()
    assert [p.name for p in target.parent.iterdir()] == ["a.json"]
    assert target.read_text() == "whole"
