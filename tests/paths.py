"""Where the tests find their data: `tests/fixtures` first, else the `shared` folder beside the repository."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
COPIED = REPOSITORY / "tests" / "fixtures"
SHARED = REPOSITORY.parent / "shared"

DATA = SHARED / "data"

_CACHE = REPOSITORY / ".cache" / "fixtures"
_ROOTS = (COPIED, SHARED / "fixtures", SHARED)


def find(relative: str | Path) -> Path | None:
    """The first place that holds `relative` ("checkpoints/tiny-fp16"), or None.

    What is kept packed, or as its difference to another fixture, is made whole (see `derived`). An absolute path under
    one of the roots is looked for under the other roots too.
    """
    relative = Path(relative)
    for root in _ROOTS:
        if relative.is_relative_to(root):
            relative = relative.relative_to(root)
            break
    found = (_whole(root / relative) for root in _ROOTS)
    return next((path for path in found if path.exists()), None)


def _whole(path: Path) -> Path:
    """A folder, or a file of one, made whole."""
    from tests import derived

    if path.is_dir():
        return derived.whole(path, _CACHE)
    if path.is_file() or not path.parent.is_dir():
        return path
    return derived.whole(path.parent, _CACHE) / path.name


def require(relative: str | Path) -> Path:
    """As `find`; the test is skipped, with the reason, where nothing is there."""
    found = find(relative)
    if found is None:
        pytest.skip(f"{relative} is neither in tests/fixtures nor in the shared folder")
    return found


def fixture(name: str) -> Path:
    """The folder of a fixture checkpoint, e.g. "tiny-fp16"."""
    return require(Path("checkpoints", name))


def golden(name: str) -> Path:
    """A golden file with its suffix, e.g. "tiny-fp16.safetensors" or "smollm2_hf_fp32.jsonl"."""
    return require(Path("goldens", name))


def full_golden(name: str) -> Path:
    """A golden as it was made, for slow tests that read what the copy in tests/fixtures leaves out."""
    path = SHARED / "fixtures" / "goldens" / name
    if not path.is_file():
        pytest.skip(f"{name} is here in part only; the whole lies in the shared folder")
    return path


def smollm2() -> Path:
    """The GGUF file of the model that ships, from the user's cache; `make test` fetches it first."""
    from specjax.files import hub

    name = "smollm2-135m"
    path = hub.default_cache_dir() / "specjax" / name / hub.NAMED_MODELS[name].file_name
    if not path.is_file():
        pytest.skip(f"{path} has not been fetched")
    return path
