import json

import numpy as np
import pytest
import safetensors.numpy

from experiments import score
from tests import paths


def _logits(run, tiny, source, output, *more: str):
    return run(score, f"--model={tiny}", f"--input_ids_file={source}", f"--output={output}", *more)


def test_logits_equal_the_golden(run, tiny, tmp_path):
    golden = paths.golden("tiny-fp16.safetensors")
    output = tmp_path / "new" / "logits.safetensors"
    code, _, errors = _logits(run, tiny, golden, output, "--dtype=float32")
    assert code == 0, errors
    found = safetensors.numpy.load_file(output)["logits"]
    expected = safetensors.numpy.load_file(golden)["logits"]
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
    assert [path.name for path in output.parent.iterdir()] == ["logits.safetensors"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"ids": np.zeros((1, 4), np.int32)}, "no tensor input_ids; it has: ids"),
        ({"input_ids": np.zeros(4, np.int32)}, r"\[4\]"),
        ({"input_ids": np.zeros((1, 4), np.float32)}, "float32"),
        ({"input_ids": np.full((1, 4), 1024, np.int64)}, "1024, outside the vocabulary"),
        ({"input_ids": np.full((1, 4), -1, np.int64)}, "-1, outside the vocabulary"),
        ({"input_ids": np.zeros((1, 2049), np.int32)}, "max_position_embeddings=2048"),
        ({"input_ids": np.zeros((1, 0), np.int32)}, "no tokens"),
    ],
)
def test_bad_token_ids_are_refused(run, tiny, tmp_path, tensors, message):
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    safetensors.numpy.save_file(tensors, source)
    code, _, errors = _logits(run, tiny, source, output)
    assert code == 2
    assert message.replace("\\", "") in errors
    assert not output.exists()


def test_bad_files_are_refused(run, tiny, tmp_path):
    output = tmp_path / "out.safetensors"
    code, _, errors = _logits(run, tiny, tmp_path / "missing.safetensors", output)
    assert code == 2 and "missing.safetensors" in errors
    whole = paths.golden("tiny-fp16.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:2000])
    code, _, errors = _logits(run, tiny, tmp_path / "cut.safetensors", output)
    assert code == 2 and "cut.safetensors" in errors
    code, _, errors = _logits(run, tiny, tmp_path / "cut.safetensors", tmp_path / "out.npz")
    assert code == 2 and ".safetensors file is written" in errors
    code, _, errors = run(score, f"--model={tiny}", f"--output={output}")
    assert code == 2 and "either" in errors
    assert not output.exists()


def test_perplexity_of_a_text(run, tiny, tmp_path):
    text, output = tmp_path / "text.txt", tmp_path / "ppl.json"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    code, printed, errors = run(
        score, f"--model={tiny}", f"--text_file={text}", f"--output={output}", "--window=64"
    )
    assert code == 0, errors
    record = json.loads(output.read_text())
    assert record["num_windows"] == -(-record["num_tokens"] // 64)
    assert record["perplexity"] == pytest.approx(np.exp(record["nll"]))
    assert 1 < record["perplexity"] < 1024
    assert f"{record['perplexity']:.4f}" in printed
    assert record["text_file"] == "text.txt"


def test_a_text_that_is_none_is_refused(run, tiny, tmp_path):
    output = tmp_path / "ppl.json"
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xfa")
    for name, message in (("empty", "0 tokens"), ("binary", "UTF-8"), ("gone", "gone.txt")):
        source = tmp_path / f"{name}.txt"
        code, _, errors = run(
            score, f"--model={tiny}", f"--text_file={source}", f"--output={output}"
        )
        assert code == 2 and message in errors
    assert not output.exists()
