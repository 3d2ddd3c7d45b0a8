"""The table of accepted drafts by depth, from hand-made rows."""

import json

import pytest

from experiments import acceptance

CONFIG = {"model": "dir/tiny", "drafter": {"kind": "ngram"}}


def row(key, output, histogram, kind="ngram"):
    config = CONFIG | {"drafter": {"kind": kind}}
    return {"id": key, "output_ids": output, "acceptance_histogram": histogram, "config": config}


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / "none.jsonl", tmp_path / "ngram.jsonl"]
    plain = [row(0, [1, 2, 3], [2], "none"), row(1, [4, 5], [1], "none"), row(2, [6], [0], "none")]
    drafted = [row(0, [1, 2, 3], [3, 1, 2]), row(1, [4, 6], [1, 0, 1])]
    for path, rows in zip(paths, (plain, drafted), strict=True):
        path.write_text("".join(json.dumps(line) + "\n" for line in rows))
    return paths


def test_lengths_and_depths(run, files, tmp_path):
    output = tmp_path / "table.md"
    code, printed, _ = run(acceptance, f"--inputs={files[0]},{files[1]}", f"--output={output}")
    assert code == 0
    assert output.read_text() == printed
    assert printed.startswith("2 prompts\n")
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in printed.splitlines()[4:]]
    assert cells[0][1:] == ["none", "1.00", "3", "5", "2 of 2", "-", "-"]
    # Steps by accepted tokens: 4 of none, 1 of one, 3 of two. 1 + (1 + 2 * 3) / 8; 4 of 8 steps; 3 of these 4.
    assert cells[-1][1:] == ["ngram", "4", "1", "3"]
    assert cells[-2][1:] == ["none", "3", "-", "-"]
    assert cells[1][1:] == ["ngram", "1.88", "8", "5", "1 of 2", "0.500", "0.750"]


def test_bad_input(run, files, tmp_path):
    assert run(acceptance, f"--inputs={tmp_path / 'no.jsonl'}")[0] == 2
    assert run(acceptance, f"--inputs={files[0]},{files[0]}")[0] == 2
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"id": 0}) + "\n")
    code, _, errors = run(acceptance, f"--inputs={files[0]},{other}")
    assert code == 2
    assert "experiments.generate" in errors
    other.write_text(json.dumps(row(0, [1], [1])) + "\n" + '{"id": 1, "out')
    code, _, errors = run(acceptance, f"--inputs={files[0]},{other}")
    assert code == 2
    assert "other.jsonl:2: not valid JSON" in errors
    other.write_text(json.dumps(row(9, [1], [1])) + "\n")
    assert run(acceptance, f"--inputs={files[0]},{other}")[0] == 2
