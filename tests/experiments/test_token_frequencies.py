"""The binary that ranks tokens: it counts, writes a list that drafters read, and names what is wrong."""

import json

import pytest

from experiments import token_frequencies
from experiments.shared import common
from specjax.errors import ConfigError
from tests import paths


def run(*arguments: str) -> None:
    token_frequencies.main(common.parse(token_frequencies.define_flags, list(arguments)))


def test_counts_a_text(tmp_path, capsys):
    text, output = tmp_path / "text.txt", tmp_path / "list.json"
    text.write_text("the cat and the dog and the bird")
    run(f"--model={paths.fixture('tiny-fp16')}", f"--text_file={text}", f"--output={output}")
    row = json.loads(output.read_text())
    assert row["num_tokens"] >= 8
    assert len(set(row["token_ids"])) == len(row["token_ids"]) == len(row["coverage"])
    assert row["coverage"][-1] == 1
    assert "share of the text" in capsys.readouterr().out


def test_ranks_by_merges_without_a_text(tmp_path, capsys):
    output = tmp_path / "list.json"
    run(f"--model={paths.fixture('tiny-fp16')}", f"--output={output}")
    row = json.loads(output.read_text())
    assert row["num_tokens"] == 0 and len(row["token_ids"]) > 900
    assert "the merges of" in capsys.readouterr().out


def test_bad_input_is_named(tmp_path):
    model = f"--model={paths.fixture('tiny-fp16')}"
    with pytest.raises(ConfigError, match=r"a \.json file"):
        run(model, f"--output={tmp_path / 'list.txt'}")
    with pytest.raises(FileNotFoundError, match="no such file"):
        run(model, f"--text_file={tmp_path / 'none.txt'}", f"--output={tmp_path / 'list.json'}")
    assert not (tmp_path / "list.json").exists()
