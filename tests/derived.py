"""Fixtures that are kept as what they add to another one, and made whole when a test asks for them.

A quantized checkpoint shares embeddings, norms and output head with the model it was made of, and a rotated one follows
from it by arithmetic. So a folder with `derived.json` holds only the tensors of its own, the names of those that are
the base's, and the SHA-256 of every tensor as the tool wrote it: what is put together is the tool's output to the last
bit, or a test fails. `crop_fixtures` writes such folders.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

from specjax.files import source, torch_writer
from tests import packed

FILE, OWN = "derived.json", "own.safetensors"
_HEAD_DIM = 64


def tensors_of(folder: Path, file: str | None = None) -> dict[str, np.ndarray]:
    """Every tensor of a folder's weights, or of one of its files."""
    opened = source.open_source(folder) if file is None else source.open_file(folder / file)
    return {name: np.array(opened.read(name)) for name in opened.names()}


def digest(array: np.ndarray) -> str:
    """Of dtype, shape and bytes."""
    head = f"{array.dtype} {list(array.shape)} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def whole(folder: Path, cache: Path) -> Path:
    """The checkpoint that `folder` describes, in a folder below `cache`, made on first use; a whole one as it is.

    Files that are packed are unpacked first.

    Args:
        folder: holds `derived.json`, what is its own (`own.safetensors`, or the file that `derived.json` names), and
            small files; the fixtures that it derives from lie beside it.
    """
    files = sorted(folder.iterdir())
    if not any(path.name == FILE or path.name.endswith(packed.SUFFIX) for path in files):
        return folder
    stamp = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    target = cache / stamp[:16] / folder.name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=target.parent))
    for path in files:
        if path.name.endswith(packed.SUFFIX):
            name = path.name.removesuffix(packed.SUFFIX)
            (made / name).write_bytes(packed.unpack(path.read_bytes()))
        else:
            shutil.copy(path, made / path.name)
    if (folder / FILE).is_file():
        _complete(made, folder.parent, cache)
    try:
        os.rename(made, target)
    except OSError:  # another test process was faster
        shutil.rmtree(made)
    return target


def _complete(made: Path, fixtures: Path, cache: Path) -> None:
    """Adds what the folder `made` has of other fixtures."""
    recipe = json.loads((made / FILE).read_text())
    bases = [whole(fixtures / name, cache) for name in recipe["bases"]]
    for name in recipe["files"]:
        shutil.copy(bases[0] / name, made / name)
    tensors = _checked(_tensors(made, bases, recipe), recipe["digests"], made)
    for name in (FILE, OWN):
        (made / name).unlink(missing_ok=True)
    if recipe["weights"].endswith(".safetensors"):
        safetensors.numpy.save_file(tensors, made / recipe["weights"], {"format": "pt"})
    else:
        torch_writer.save(tensors, made / recipe["weights"])


def _tensors(folder: Path, bases: list[Path], recipe: Mapping) -> dict[str, np.ndarray]:
    if recipe["rotated"]:
        return rotated(tensors_of(bases[0]), tensors_of(folder, "rotation.pth")["tensor"])
    own, theirs = tensors_of(folder, recipe["own"]), union(tensors_of(base) for base in bases)
    copies = {name: theirs[name].astype(_dtype(dtype)) for name, dtype in recipe["copies"].items()}
    return {name: (own | copies)[name] for name in recipe["digests"]}


def union(bases: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The tensors of several checkpoints, the first one's before the others'; a target's also as heads name them."""
    made: dict[str, np.ndarray] = {}
    for tensors in bases:
        made = tensors | {n.removeprefix("model."): a for n, a in tensors.items()} | made
    return made


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def _checked(tensors: dict, digests: Mapping[str, str], folder: Path) -> dict[str, np.ndarray]:
    found = {name: digest(array) for name, array in tensors.items()}
    wrong = [name for name in digests if found.get(name) != digests[name]]
    assert found.keys() == digests.keys() and not wrong, (
        f"{folder}: not the tool's tensors: {wrong}"
    )
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def rotated(tensors: Mapping[str, np.ndarray], q: np.ndarray) -> dict[str, np.ndarray]:
    """A Llama under the residual rotation h Q and per-head Hadamards of values, as QQQ's rotation stores it.

    Norms are folded into the linears behind them, in float16 as there; sums are in float64.

    Args:
        tensors: float16, by Hugging Face names.
        q: [D, D] float64.
    """
    half = lambda w: w.astype(np.float32).astype(np.float16)
    wide = {name: array.astype(np.float64) for name, array in tensors.items()}
    heads = _hadamard(_HEAD_DIM)
    norms = {"q_proj": "input", "k_proj": "input", "v_proj": "input"}
    norms |= {"gate_proj": "post_attention", "up_proj": "post_attention"}
    made = {}
    for name, w in wide.items():
        leaf, layer = name.split(".")[-2], ".".join(name.split(".")[:3])
        if "norm" in leaf:
            made[name] = half(np.ones_like(w))
            continue
        if leaf == "lm_head":
            w = half(w * wide["model.norm.weight"])
        elif leaf in norms:
            w = half(w * wide[f"{layer}.{norms[leaf]}_layernorm.weight"])
        w = half(q.T @ w if leaf in ("o_proj", "down_proj") else w.astype(np.float64) @ q)
        if leaf == "v_proj":
            blocks = w.astype(np.float64).reshape(-1, _HEAD_DIM, w.shape[1])
            w = half(np.einsum("hcd,ce->hed", blocks, heads).reshape(w.shape))
        if leaf == "o_proj":
            blocks = w.astype(np.float64).reshape(w.shape[0], -1, _HEAD_DIM)
            w = half((blocks @ heads).reshape(w.shape))
        made[name] = w
    return made


def _hadamard(size: int) -> np.ndarray:
    made = np.ones((1, 1))
    while len(made) < size:
        made = np.block([[made, made], [made, -made]])
    return made / np.sqrt(size)
