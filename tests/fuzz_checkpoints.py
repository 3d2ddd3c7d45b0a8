"""Mutated checkpoints of every format: each loads right, or fails with one line that names what is wrong.

    python -m tests.fuzz_checkpoints --count=500

An outcome is one of

    same      the same weights and settings as unmutated, so the same logits
    changed   other ones, as the mutated file now says (`_may_change` states what a mutation may change)
    refused   one line of `specjax.errors` or FileNotFoundError that names the field, tensor or file
    WRONG     other weights or settings than the file says
    UNNAMED   an error that does not name what was mutated
    TRACEBACK any other exception, or an error of several lines

The last three are faults.
"""

import collections
import copy
import dataclasses
import getopt
import json
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from specjax.errors import SpecjaxError
from tests import fuzz_bases
from tests.fuzz_bases import Base

FAULTS = ("WRONG", "UNNAMED", "TRACEBACK")
_VALUES = (
    None,
    True,
    False,
    "text",
    "",
    -1,
    0,
    3,
    2.5,
    [],
    [1, "a"],
    {},
    {"a": 1},
    1e30,
    10**25,
    float("nan"),
)
# What a key of config.json may change, by field of ModelConfig; keys that are not here change nothing.
_CONFIG_KEYS = {
    "architectures": {"architecture", "qkv_bias", "o_bias", "mlp_bias"},
    "model_type": {"architecture"},
    "rope_parameters": {"rope"},
    "rope_theta": {"rope"},
    "rope_scaling": {"rope"},
    "partial_rotary_factor": {"rope"},
    "rms_norm_eps": {"rms_norm_eps"},
    "max_position_embeddings": {"max_position_embeddings", "rope"},
    "bos_token_id": {"bos_token_id"},
    "eos_token_id": {"eos_token_ids"},
    "dtype": {"dtype"},
    "torch_dtype": {"dtype"},
    "attention_bias": {"qkv_bias", "o_bias"},
    "mlp_bias": {"mlp_bias"},
    "tie_word_embeddings": {"tie_word_embeddings"},
}
_HEAD_KEYS = {
    "norm_before_residual": {"variant"},
    "norm_output": {"variant"},
    "norm_before_fc": {"variant"},
    "fc_norm": {"variant"},
    "eagle_aux_hidden_state_layer_ids": {"layer_ids"},
    "speculators_config": {"length"},
    "mask_token_id": {"mask_token"},
    "layer_types": {"windows"},
    "sliding_window": {"windows"},
}
_SHARED = ("embed_tokens.weight", "lm_head.weight")
_ALL_OF_LAYERS = ("rope", "windows", "rms_norm_eps", "max_position_embeddings", "dtype")
_GGUF_KEYS = {
    "llama.rope.freq_base": {"rope"},
    "llama.context_length": {"max_position_embeddings"},
    "llama.attention.layer_norm_rms_epsilon": {"rms_norm_eps"},
    "tokenizer.ggml.bos_token_id": {"bos_token_id"},
    "tokenizer.ggml.eos_token_id": {"eos_token_ids"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutation:
    """A mutated checkpoint.

    Attributes:
        kind: what was done.
        what: to which part.
        base: the checkpoint now.
        names: an error must have one of them.
        fields: of the configuration that may differ.
        weights: whether weights may differ.
        spoil: a change of files after they were written.
    """

    kind: str
    what: str
    base: Base
    names: tuple[str, ...]
    fields: frozenset[str] = frozenset()
    weights: bool = False
    spoil: Callable[[Path], None] | None = None


def _leaf(path: tuple) -> str:
    return next(str(key) for key in reversed(path) if not isinstance(key, int))


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths of all values of a JSON object, three levels deep."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    found = []
    for key, item in list(items)[:40]:
        found.append((*path, key))
        if len(path) < 3:
            found += _places(item, (*path, key))
    return found


def _edited(base: Base, file: str, path: tuple, change: Callable[[Any, Any], None]) -> Base:
    files = copy.deepcopy(base.files)
    node = files[file]
    for key in path[:-1]:
        node = node[key]
    change(node, path[-1])
    return dataclasses.replace(base, files=files)


def _field(rng, base: Base, kind: str) -> Mutation:
    file = str(rng.choice(sorted(base.files)))
    places = _places(base.files[file])
    path = places[rng.integers(len(places))]
    if kind == "remove field":
        value, edited = "", _edited(base, file, path, lambda node, key: node.pop(key))
    else:
        values = [
            v for v in _VALUES if base.container != "gguf" or type(v) in (bool, int, float, str)
        ]
        if base.container == "gguf":
            values = [v for v in values if v != 10**25 and v != -1]
        value = values[rng.integers(len(values))]
        edited = _edited(base, file, path, lambda node, key: node.__setitem__(key, value))
    fields, weights = _may_change(base, file, path)
    text = ".".join(map(str, path))
    names = tuple(str(key) for key in path if not isinstance(key, int))
    shown = f"{file}:{text}" + (f" = {value!r}" if kind != "remove field" else "")
    return Mutation(
        kind=kind,
        what=shown,
        base=edited,
        names=(*names, *(n.rpartition(".")[2] for n in names), file, *_about(base, str(path[0]))),
        fields=frozenset(fields),
        weights=weights,
    )


_SIZES = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "draft_vocab_size", "eagle_aux_hidden_state_layer_ids"),
    *("feed_forward_length", "embedding_length", "head_count", "head_count_kv"),
}


def _about(base: Base, key: str = "") -> tuple[str, ...]:
    """What else names the place: a tensor's shape that contradicts a size; messages of the tokenizers library name no
    field.
    """
    if base.kind == "tokenizer":
        return ("tokenizer",)
    return ("has shape", "shape is") if key.rpartition(".")[2] in _SIZES else ()


def _may_change(base: Base, file: str, path: tuple) -> tuple[set[str], bool]:
    """Fields of the configuration that a JSON value states, and whether it states weights."""
    top = str(path[0])
    if base.kind == "tokenizer":
        return {"ids"}, False
    if file == "medusa_choices.json":
        return {"choices"}, False
    if base.container == "gguf":
        return _GGUF_KEYS.get(top, set()), False
    if file == "config.json" and top == "quantization_config":
        # Whether inputs are rounded is only said here.
        rounding = {"input_activations", "config_groups", "group_0"} & set(map(str, path))
        scheme = base.name == "specjax" and "scheme" in path
        return ({"activations"} if rounding or scheme or base.name == "orbax" else set()), False
    if base.kind == "head":
        leaf = str(path[1]) if top == "transformer_layer_config" and len(path) > 1 else top
        if top == "transformer_layer_config" and len(path) == 1:
            return {*_ALL_OF_LAYERS}, False
        return _HEAD_KEYS.get(leaf, set()) | _CONFIG_KEYS.get(leaf, set()), False
    if base.kind == "eagle3" and top == "eagle_aux_hidden_state_layer_ids":
        return {"layer_ids"}, False
    return _CONFIG_KEYS.get(top, set()) if file == "config.json" else set(), False


def _broken_json(rng, base: Base, kind: str) -> Mutation | None:
    if base.container == "gguf":
        return None
    file = str(rng.choice(sorted(base.files)))
    text = json.dumps(base.files[file])
    at = int(rng.integers(len(text)))
    mutated = text[:at] if rng.integers(2) else text[:at] + "}" + text[at + 1 :]
    if _is_json(mutated):
        return None
    fields = {"ids"} if base.kind == "tokenizer" else set()
    return Mutation(
        kind=kind,
        what=f"{file} at {at}",
        base=base,
        names=(file, *_about(base)),
        fields=frozenset(fields),
        spoil=lambda path: (path / file).write_text(mutated),
    )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _module(name: str) -> tuple[str, ...]:
    """What may stand for a tensor in a message: its name, its module's, and those of what it was fused of."""
    prefix = name.rpartition(".")[0]
    return (name, prefix) if prefix.count(".") > 0 else (name,)


def _tensor(rng, base: Base, kind: str) -> Mutation | None:
    if not base.tensors:
        return None
    name = sorted(base.tensors)[rng.integers(len(base.tensors))]
    tensors, gguf = dict(base.tensors), base.container == "gguf"
    array = tensors[name][1] if gguf else tensors[name]
    weights, what = False, name
    match kind:
        case "drop tensor":
            del tensors[name]
            # A head without its own uses the target's.
            weights = base.kind in ("eagle3", "head") and name in _SHARED
        case "rename tensor":
            other = f"{name}x" if rng.integers(2) else name.replace(".1.", ".7.", 1)
            if other == name:
                return None
            tensors[other], what = tensors.pop(name), f"{name} -> {other}"
        case "change shape":
            changed = _reshaped(rng, array)
            if changed is None or changed.shape == array.shape or (gguf and changed.shape[-1] % 32):
                return None
            tensors[name] = (tensors[name][0], changed) if gguf else changed
            what = f"{name} {list(array.shape)} -> {list(changed.shape)}"
        case "change dtype":
            if gguf:
                return None
            dtypes = [np.float16, np.float32, np.float64, np.int8, np.uint8, np.int32, np.int64]
            dtype = np.dtype(dtypes[rng.integers(len(dtypes))])
            if dtype == array.dtype:
                return None
            with np.errstate(all="ignore"):
                tensors[name] = array.astype(dtype)
            # Narrower floats are what the file now says.
            weights = dtype.kind == "f" and array.dtype.kind in "fV"
            what = f"{name} {array.dtype} -> {dtype}"
        case "spoil values":
            if array.size == 0:
                return None
            spoiled, weights = _spoiled(rng, array)
            tensors[name] = (tensors[name][0], spoiled) if gguf else spoiled
    mutated = dataclasses.replace(base, tensors=tensors)
    names = (*_module(name), what.rpartition(" -> ")[2])
    return Mutation(kind=kind, what=what, base=mutated, names=names, weights=weights)


def _reshaped(rng, array: np.ndarray) -> np.ndarray | None:
    if array.ndim == 0 or array.size == 0:
        return None
    match rng.integers(4):
        case 0:
            return array[:-1] if len(array) > 1 else None
        case 1:
            return np.concatenate([array, array[:1]])
        case 2:
            return array.T
        case _:
            return array.reshape(1, -1) if array.ndim == 1 else array.reshape(-1)


def _spoiled(rng, array: np.ndarray) -> tuple[np.ndarray, bool]:
    """One value that is NaN, infinite or huge; integers become other ones, which nothing can tell from right ones."""
    spoiled = array.copy()
    at = np.unravel_index(rng.integers(array.size), array.shape)
    if array.dtype.kind in "fV":
        value = [np.nan, np.inf, 1e30, 6e4][rng.integers(4)]
        with np.errstate(over="ignore"):
            spoiled[at] = value
        return spoiled, bool(np.isfinite(spoiled[at].astype(np.float32)))
    info = np.iinfo(array.dtype)
    spoiled[at] = rng.integers(info.min, info.max, dtype=array.dtype)
    return spoiled, True


def _truncated(rng, base: Base, kind: str) -> Mutation | None:
    if base.container in ("none", "orbax"):
        return None

    def spoil(path: Path) -> None:
        file = path if path.is_file() else _weight_file(base, path)
        data = file.read_bytes()
        file.write_bytes(data[: int(share * len(data))])

    share = rng.uniform(0, 0.999)
    names = (base.weights, "model.gguf", "model-00001-of-00002.safetensors")
    return Mutation(kind=kind, what=f"{share:.3f}", base=base, names=names, spoil=spoil)


def _header(rng, base: Base, kind: str) -> Mutation | None:
    """One byte of a safetensors header: names, dtypes, shapes, offsets."""
    if base.container != "safetensors":
        return None
    at, byte = rng.uniform(), int(rng.integers(32, 127))

    def spoil(path: Path) -> None:
        file = path / base.weights
        data = bytearray(file.read_bytes())
        length = int.from_bytes(data[:8], "little")
        data[8 + int(at * length)] = byte
        file.write_bytes(bytes(data))

    names = (base.weights, "model.", "layers", "lm_head", "norm", "fc", ".linear", ".weight")
    what = f"byte {at:.3f} = {chr(byte)!r}"
    return Mutation(kind=kind, what=what, base=base, names=names, spoil=spoil)


def _weight_file(base: Base, path: Path) -> Path:
    single = path / base.weights
    return single if single.is_file() else path / "model-00001-of-00002.safetensors"


def _index(rng, base: Base, kind: str) -> Mutation | None:
    if base.container != "sharded":
        return None
    file = f"{base.weights}.index.json"
    name = sorted(base.tensors)[rng.integers(len(base.tensors))]
    values = [
        "gone.safetensors",
        "../x.safetensors",
        3,
        None,
        "model-00002-of-00002.safetensors",
        "",
    ]
    value = values[rng.integers(len(values))]
    path = ("weight_map", name if rng.integers(3) else "mtp.weight")
    edited = _edited(base, file, path, lambda node, key: node.__setitem__(key, value))
    what = f"{path[1]} -> {value!r}"
    return Mutation(kind=kind, what=what, base=edited, names=(path[1], file))


KINDS: dict[str, Callable] = {
    "remove field": _field,
    "retype field": _field,
    "break JSON": _broken_json,
    "drop tensor": _tensor,
    "rename tensor": _tensor,
    "change shape": _tensor,
    "change dtype": _tensor,
    "spoil values": _tensor,
    "truncate file": _truncated,
    "change header": _header,
    "change index": _index,
}


class Fuzz:
    """Mutates and judges; the same seed gives the same cases.

    Attributes:
        bases: the checkpoints.
    """

    def __init__(self, scratch: Path):
        self._scratch = scratch
        self.bases = fuzz_bases.all_bases(scratch / "bases")
        self._right = {base.name: self._load(base, "right") for base in self.bases}

    def _load(self, base: Base, case: str) -> dict[str, Any]:
        return fuzz_bases.load(base, fuzz_bases.write(base, self._scratch / case / base.name))

    def case(self, seed: int) -> tuple[Base, Mutation]:
        """One mutation; formats take turns."""
        rng = np.random.default_rng([seed, 16])
        base = self.bases[seed % len(self.bases)]
        while True:
            kind = list(KINDS)[rng.integers(len(KINDS))]
            if mutation := KINDS[kind](rng, base, kind):
                return base, mutation

    def run(self, seed: int) -> tuple[str, str, str, str]:
        """Returns format, kind of mutation, outcome and the story."""
        base, mutation = self.case(seed)
        outcome, said = self._judge(base, mutation, f"case{seed}")
        shutil.rmtree(self._scratch / f"case{seed}")
        return base.name, mutation.kind, outcome, f"{mutation.what}: {said}"

    def _judge(self, base: Base, mutation: Mutation, case: str) -> tuple[str, str]:
        path = fuzz_bases.write(mutation.base, self._scratch / case / base.name)
        try:
            if mutation.spoil is not None:
                mutation.spoil(path)
            found = fuzz_bases.load(base, path)
        except (SpecjaxError, FileNotFoundError) as error:
            text = str(error)
            if "\n" in text:
                return "TRACEBACK", text
            named = any(name in text for name in mutation.names if name)
            return "refused" if named else "UNNAMED", text
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)
            ours = [f for f in where if "/specjax/" in f.filename] or where
            place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
            return "TRACEBACK", f"{type(error).__name__} at {place}: {str(error)[:200]}"
        return self._compare(base, mutation, found)

    def _compare(self, base: Base, mutation: Mutation, found: dict) -> tuple[str, str]:
        differing = _differing(self._right[base.name], found)
        allowed = set(mutation.fields)
        unexpected = [
            name
            for name in differing
            if name.rpartition(".")[2] not in allowed
            and not (mutation.weights and not name.startswith("config."))
        ]
        if not differing:
            return "same", ""
        return ("WRONG" if unexpected else "changed"), ", ".join(unexpected or differing)[:200]


def _differing(right: dict, found: dict) -> list[str]:
    names = []
    for name in sorted({*right, *found}):
        one, other = right.get(name), found.get(name)
        if name == "config" and one is not None and other is not None:
            names += [f"config.{key}" for key in one if repr(one[key]) != repr(other[key])]
        elif isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
            if one.shape != other.shape or not np.array_equal(one, other):
                names.append(name)
        elif isinstance(one, np.ndarray) or isinstance(other, np.ndarray) or one != other:
            names.append(name)
    return names


def main() -> None:
    """--count: cases; --start: seed of the first; --verbose: print every case."""
    given = dict(getopt.getopt(sys.argv[1:], "", ["count=", "start=", "verbose"])[0])
    start, count = int(given.get("--start", 0)), int(given.get("--count", 500))
    with tempfile.TemporaryDirectory() as folder:
        fuzz, rows = Fuzz(Path(folder)), []
        for seed in range(start, start + count):
            rows.append(fuzz.run(seed))
            if "--verbose" in given or rows[-1][2] in FAULTS:
                print(seed, *rows[-1], sep=" | ", flush=True)
    table(rows)
    print("\nchanged nothing:")
    for (kind, story), count in collections.Counter(
        (row[1], row[3].rstrip(": ")) for row in rows if row[2] == "same"
    ).items():
        print(f"  {kind}: {story}" + (f" ({count} times)" if count > 1 else ""))


def table(rows: list[tuple[str, str, str, str]]) -> None:
    """Outcomes by kind of mutation and by format."""
    outcomes = ("same", "changed", "refused", *FAULTS)
    print("\n| | cases | " + " | ".join(outcomes) + " |\n|" + "---|" * (len(outcomes) + 2))
    for column in (1, 0):
        for name in dict.fromkeys(row[column] for row in rows):
            found = collections.Counter(row[2] for row in rows if row[column] == name)
            print(
                f"| {name} | {found.total()} | "
                + " | ".join(str(found[o]) for o in outcomes)
                + " |"
            )
    total = collections.Counter(row[2] for row in rows)
    print(f"| all | {total.total()} | " + " | ".join(str(total[o]) for o in outcomes) + " |")


if __name__ == "__main__":
    main()
