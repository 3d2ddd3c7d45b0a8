"""From files to windows of tokens, with errors that give the numbers."""

import json

import numpy as np
import pytest

from specjax.errors import ConfigError
from specjax.quantize import calibration


class Letters:
    """A tokenizer with one token per character; its chat template marks turns with 0 and 1."""

    def encode(self, text, add_special_tokens=True):
        return [ord(letter) for letter in text]

    def apply_chat_template(self, messages):
        turns = [[0, *self.encode(message["content"])] for message in messages]
        return [token for turn in turns for token in turn] + [1]


def read(path, text):
    path.write_text(text, encoding="utf-8")
    return calibration.read_documents(path, Letters())


def letters(text):
    return [ord(letter) for letter in text]


def test_a_text_file_is_one_document(tmp_path):
    assert read(tmp_path / "a.txt", "ab\n\nc") == [letters("ab\n\nc")]


ROWS = [
    ({"text": "raw"}, letters("raw")),
    ({"prompt": "hi"}, [0, *letters("hi"), 1]),
    ({"prompt": "hi", "response": "yo"}, [0, *letters("hi"), 1, *letters("yo")]),
    ({"turns": ["one", "two"]}, [0, *letters("one"), 1]),
    ({"messages": [{"role": "user", "content": "q"}]}, [0, *letters("q"), 1]),
    (
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a"},
            ]
        },
        [0, *letters("q"), 1, *letters("a")],
    ),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_rows_of_every_kind(tmp_path, suffix):
    rows = [row for row, _ in ROWS]
    lines = "\n\n".join(json.dumps(row) for row in rows) if suffix == ".jsonl" else json.dumps(rows)
    assert read(tmp_path / f"a{suffix}", lines) == [expected for _, expected in ROWS]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "  \n", "is empty"),
        ("a.jsonl", '{"text": "x"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", '{"body": 1}', r"line 1 has none of the fields text, .*found \['body'\]"),
        ("a.json", '{"text": "x"}', "expected a JSON list"),
        ("a.json", '[{"text": "x"}, 3]', "row 2 has none of the fields"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user"}]}',
            r"line 1: messages\[0\]: content is missing",
        ),
        ("a.jsonl", '{"turns": [5]}', r"line 1: messages\[0\]\.content: .* found int"),
    ],
)
def test_bad_files_are_named(tmp_path, name, text, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / name, text)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"calibration_file=.*none\.txt: no such file"):
        calibration.read_documents(tmp_path / "none.txt", Letters())


def test_windows_are_deterministic_and_cover_shuffled_documents():
    documents = [[i] * 5 for i in range(20)]
    every_token = np.repeat(np.arange(20), 5)
    first = calibration.windows(documents, 4, 10, 0, "x")
    np.testing.assert_array_equal(first, calibration.windows(documents, 4, 10, 0, "x"))
    assert first.shape == (4, 10) and first.dtype == np.int32
    assert not np.array_equal(first, calibration.windows(documents, 4, 10, 1, "x"))
    everything = calibration.windows(documents, 0, 10, 0, "x")
    np.testing.assert_array_equal(np.sort(everything, axis=None), every_token)


def test_too_little_text_is_refused_with_the_numbers():
    message = r"calibration_file=x: 25 tokens make 2 windows of 10, 3 are wanted \(30 tokens\)"
    with pytest.raises(ConfigError, match=message):
        calibration.windows([[1] * 25], 3, 10, 0, "x")
    with pytest.raises(ConfigError, match="0 windows"):
        calibration.windows([[1] * 5], 0, 10, 0, "x")
