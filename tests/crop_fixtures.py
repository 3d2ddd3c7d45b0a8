"""Writes `tests/fixtures` anew from the folder that has the fixtures in full: `python -m tests.crop_fixtures FOLDER`.

Nothing is computed here: tensors, rows and layers are left out. Checkpoints of formats keep one layer (the goldens'
weights are of layer 0) and share what is dense with tiny-fp16 (see `derived`); goldens keep every 13th row of decoded
weights and what the fast tests read.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy

from tests import derived, packed, paths

BASE = "tiny-fp16"
# Coprime to the tiles of every packing, so that all places in a tile occur.
STRIDE = 13
LOGIT_ROWS = 8
# Layers kept: two where a golden or a test reads both.
LAYERS = {
    **{"tiny-gptq-g128": 2, "tiny-qqq-g128": 2, "tiny-ct-w4a16": 2, "tiny-ct-w8a8-sq": 2},
    **{"qserve-w8a8": 2, "qserve-w4a8-g128": 2},
    **{"tiny-gptq-actorder": 1, "tiny-awq-g128": 1, "tiny-qqq": 1},
    **{"specmquant-w4a16-converted": 1, "specmquant-qqq-g128-converted": 1},
}
# A head, its file, whose tensors it repeats, and a file of torch with the same tensors.
HEADS = (
    ("eagle2-tiny", "model.safetensors", ("tiny-fp16",), None),
    ("eagle3-tiny", "model.safetensors", (), "pytorch_model.bin"),
    ("rotation-eagle2-tiny", "pytorch_model.bin", ("eagle2-tiny", "tiny-fp16"), None),
)
# Settings whose rounds the fast tests replay.
ROUNDS = {
    "eagle2-tiny": ("d5k10n60", "d5k1n6"),
    "eagle3-tiny": ("d3k4n12",),
    "rotation-eagle2-tiny": ("d3k4n12",),
}
_LOGITS_READ = ("tiny-ct-w4a16", "tiny-ct-w8a8-sq", "rotation-tiny")
_LOGITS = ("logits", "logits_unrotated")
_SMALL = 20_000
_UNREAD = ("Q", "features_unrotated")
_BIG = (".safetensors", ".bin", ".pt")


def crop_format(source: Path, target: Path, layers: int) -> None:
    """A quantized checkpoint without the layers above and without what it shares with the base."""
    weights = next(
        p for p in source.iterdir() if p.suffix == ".safetensors" and "s2_" not in p.name
    )
    kept = lambda name: not name.startswith(tuple(f"model.layers.{i}." for i in range(layers, 2)))
    tensors = {n: a for n, a in derived.tensors_of(source, weights.name).items() if kept(n)}
    base = derived.tensors_of(source.parent / BASE)
    copies = {name: str(a.dtype) for name, a in tensors.items() if _same(a, base.get(name))}
    _start(source, target)
    own = {name: array for name, array in tensors.items() if name not in copies}
    safetensors.numpy.save_file(own, target / derived.OWN, {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["num_hidden_layers"] = layers
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    _recipe(target, weights.name, tensors, copies, _shared_files(source, target))


def crop_rotation(fixtures: Path, target: Path) -> None:
    """rotation-tiny from the matrix alone, and the head that was converted for it."""
    source = fixtures / "rotation-tiny"
    _start(source, target / source.name)
    shutil.copy(source / "rotation.pth", target / source.name)
    files = _shared_files(source, target / source.name)
    tensors = derived.tensors_of(source, "model.safetensors")
    _recipe(target / source.name, "model.safetensors", tensors, {}, files, rotated=True)


def crop_head(
    fixtures: Path, target: Path, name: str, weights: str, bases: tuple[str, ...], twin: str | None
) -> None:
    """A draft head without what it shares with its target, or with the head that it was converted from.

    With a `twin`, a file of torch with the same tensors, that file is what is kept.
    """
    source = fixtures / name
    _start(source, target / name)
    tensors = derived.tensors_of(source, weights)
    theirs = derived.union(derived.tensors_of(fixtures / base) for base in bases)
    own = {n: array for n, array in tensors.items() if not _same(array, theirs.get(n))}
    copies = {n: str(array.dtype) for n, array in tensors.items() if n not in own}
    if twin is None:
        safetensors.numpy.save_file(own, target / name / derived.OWN, {"format": "pt"})
    else:
        copy_files(source, target / name, twin)
    _recipe(target / name, weights, tensors, copies, [], bases=bases, own=twin or derived.OWN)


def copy_files(source: Path, target: Path, *names: str) -> None:
    """Some files of a fixture as they are."""
    target.mkdir(exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)


def crop_rounds(source: Path, target: Path, settings: tuple[str, ...]) -> None:
    """The golden of an EAGLE head without the rounds and logits that only slow tests read."""
    first = ("p0.d3k4n12.r0.features_in", "p0.d3k4n12.r0.head_out_prefill")

    def kept(name: str) -> bool:
        parts = name.split(".")
        return (
            name in first
            or parts[1] in ("input_ids", "greedy_ids")
            or (parts[1] in settings and parts[-1] not in ("features_in", "head_out_levels"))
        )

    tensors = {n: a for n, a in safetensors.numpy.load_file(source).items() if kept(n)}
    safetensors.numpy.save_file(tensors, target)


def crop_golden(source: Path, target: Path) -> None:
    """The golden of a checkpoint: every 13th row of weights, the first rows of long logits, no kernels' outputs."""
    cropped = {}
    read = source.stem in _LOGITS_READ
    for name, array in safetensors.numpy.load_file(source).items():
        if name.startswith(("logits", "features_rotated")) and not (read and name in _LOGITS):
            continue
        if name in _UNREAD:
            continue
        if name.startswith(("codes.", "w8.")) and not name.endswith("down_proj"):
            continue
        if name.startswith("dequant."):
            array = array[::STRIDE]
        if name in ("p0.base_logits", "p0.medusa_logits"):
            array = array[..., :LOGIT_ROWS, :]
        cropped[name] = np.ascontiguousarray(array)
    safetensors.numpy.save_file(cropped, target)


def _same(array: np.ndarray, base: np.ndarray | None) -> bool:
    if base is None or array.shape != base.shape:
        return False
    return array.tobytes() == base.astype(array.dtype).tobytes()


def _start(source: Path, target: Path) -> None:
    """An empty folder with the small files."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix not in (*_BIG, ".pth") or path.name.startswith("s2_order"):
            shutil.copyfile(path, target / path.name)


def _shared_files(source: Path, target: Path) -> list[str]:
    """Names of small files that are the base's; they leave `target`."""
    base = source.parent / BASE
    shared = [p.name for p in target.iterdir() if (base / p.name).is_file()]
    shared = [n for n in shared if (base / n).read_bytes() == (target / n).read_bytes()]
    for name in shared:
        (target / name).unlink()
    return sorted(shared)


def _recipe(
    target, weights, tensors, copies, files, rotated=False, bases=(BASE,), own=derived.OWN
) -> None:
    recipe = {
        **{"bases": bases, "own": own, "weights": weights, "files": files},
        **{"rotated": rotated, "copies": copies},
        "digests": {name: derived.digest(array) for name, array in sorted(tensors.items())},
    }
    (target / derived.FILE).write_text(json.dumps(recipe, indent=1) + "\n")


def main(fixtures: Path) -> None:
    checkpoints, goldens = paths.COPIED / "checkpoints", paths.COPIED / "goldens"
    for name, layers in LAYERS.items():
        crop_format(fixtures / "checkpoints" / name, checkpoints / name, layers)
        crop_golden(fixtures / "goldens" / f"{name}.safetensors", goldens / f"{name}.safetensors")
    crop_rotation(fixtures / "checkpoints", checkpoints)
    for head in HEADS:
        crop_head(fixtures / "checkpoints", checkpoints, *head)
    medusa = ("README.md", "config.json", "medusa_choices.json", "medusa_lm_head.safetensors")
    copy_files(fixtures / "checkpoints" / "medusa-tiny", checkpoints / "medusa-tiny", *medusa)
    for name in ("rotation-tiny", "medusa-tiny"):
        golden = f"{name}.safetensors"
        crop_golden(fixtures / "goldens" / golden, goldens / golden)
    copy_files(fixtures / "goldens", goldens, "medusa-tiny.json")
    packed.main([p for p in paths.COPIED.rglob("*.safetensors") if p.stat().st_size > _SMALL])
    for head, settings in ROUNDS.items():
        golden = f"{head}.safetensors"
        crop_rounds(fixtures / "goldens" / golden, goldens / golden, settings)
        shutil.copyfile(fixtures / "goldens" / f"{head}.json", goldens / f"{head}.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
