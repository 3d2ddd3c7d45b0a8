"""Writes heads and their recorded rounds into `tests/fixtures/heads`: `python -m tests.crop_heads FOLDER NAME ...`.

FOLDER has `checkpoints/NAME` and `goldens/NAME.*` in full. Targets are kept whole; of a head's rounds those of the
first prompts, of the others the prompt and what was accepted. A head whose tensors are those of another one (`SAME`)
keeps its config.json only.
"""

import json
import shutil
import sys
from pathlib import Path

import safetensors.numpy

from tests import derived, packed, paths

# Head -> the one whose weights it has, under another configuration.
SAME = {"eagle3-classic-qwen3": "eagle3-deepspec-qwen3"}
NUM_PROMPTS = 2
_ALWAYS = ("input_ids", "greedy_ids")
_UNREAD = ("prefill_logits", "prefill_hidden")


def crop(source: Path, name: str, target: Path) -> None:
    """One head or target."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    folder = source / "checkpoints" / name
    if folder.is_dir():
        crop_tensors(folder, name, target)
    record = source / "goldens" / f"{name}.json"
    if record.is_file():
        crop_rounds(record, target)


def crop_tensors(folder: Path, name: str, target: Path) -> None:
    """A folder's configuration and weights."""
    shutil.copyfile(folder / "config.json", target / "config.json")
    tensors = derived.tensors_of(folder)
    if name in SAME:
        digests = {n: derived.digest(array) for n, array in sorted(tensors.items())}
        recipe = {"bases": [SAME[name]], "own": derived.OWN, "weights": "model.safetensors"}
        recipe |= {"files": [], "rotated": False, "digests": digests}
        recipe["copies"] = {n: str(array.dtype) for n, array in tensors.items()}
        safetensors.numpy.save_file({}, target / derived.OWN)
        (target / derived.FILE).write_text(json.dumps(recipe, indent=1) + "\n")
    else:
        safetensors.numpy.save_file(tensors, target / "model.safetensors", {"format": "pt"})
        packed.main([target / "model.safetensors"])


def crop_rounds(record: Path, target: Path) -> None:
    """The recorded rounds of a head."""
    content = json.loads(record.read_text())
    (target / "golden.json").write_text(json.dumps(content, indent=1) + "\n")
    kept_prompts = {f"p{prompt['prompt']}" for prompt in content["prompts"][:NUM_PROMPTS]}
    kept = {}
    for key, array in safetensors.numpy.load_file(record.with_suffix(".safetensors")).items():
        prompt, *middle, field = key.split(".")
        of_round = prompt in kept_prompts and bool(middle) and middle[-1].startswith("r")
        if field in _ALWAYS or (of_round and field not in _UNREAD):
            kept[key] = array
    safetensors.numpy.save_file(kept, target / "golden.safetensors")
    packed.main([target / "golden.safetensors"])


if __name__ == "__main__":
    for head in sys.argv[2:]:
        crop(Path(sys.argv[1]), head, paths.COPIED / "heads" / head)
